"""Sampling from a model and searching with it.

- `engine`: the compiled programs that decode in slots of a KV cache
- `engine_sizes`: slots, their capacity, and the layout that an engine is made for
- `token_sampling`: draws the next token from logits
- `episodes`: records of sampled tokens, one at a time and as arrays
- `episode_sampler`: samples groups of episodes of prompts
- `slot_queue`: hands free slots to the next episodes
- `stop_strings`: ends episodes by their text
- `beam_search`: finds the completions of highest score
- `text_generator`: makes completions, chat turns and verdicts with one loaded model
"""
