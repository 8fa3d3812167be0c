"""Rewards of completions.

- `reward_functions`: reward expressions, compiled to one function over a batch
- `reward_parts`: the words of the language as functions over rows
- `reward_rows`: turns episodes into the rows that rewards read, and into records with scores
- `number_match`: reads numbers in texts and compares them exactly
- `rubric`: scores by a judge, against criteria in plain words
- `endpoint`: a judge behind an OpenAI-compatible chat API
- `learned_scorer`: scores by a reward model
"""
