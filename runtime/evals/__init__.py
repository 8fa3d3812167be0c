"""Measurements of a model.

- `run_evals`: runs a declared eval: samples and scores, a perplexity, or preferences
- `score_answers`: log-probabilities or scores of all answers of a corpus
- `statistics`: estimates over prompts, and their confidence intervals
"""
