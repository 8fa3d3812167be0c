"""Losses as pure functions of arrays, and the objectives made of them.

- `advantages`: advantages of completions within their group.
- `answer_scores`: the objectives of preference stages, from the scores of answers.
- `distill_losses`: divergences from a teacher, transfer of attention maps and features.
- `gae`: advantages from a critic's values, and the critic's loss.
- `policy_gradient`: losses of sampled completions.
- `preference_losses`: losses of pairs and labelled answers, and of reward models.
"""
