def score(completion, target):
    return float(completion == target)


def lonely(text):
    return 0.0


def needs_level(completion, level):
    return 0.0


async def waits(completion):
    return 0.0


def surprise(logits, targets):
    return targets * 0.0


def scaled(logits, targets, temperature):
    return targets * 0.0


def rows(count, start=0):
    yield {"question": str(start + count)}


def spread(score, level):
    return 0.0
