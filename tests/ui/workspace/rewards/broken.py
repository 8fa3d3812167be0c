def score(completion:
