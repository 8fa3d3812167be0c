"""Sampling from a model and searching with it.

- `engine`: the compiled programs that decode in slots of a KV cache
- `engine_sizes`: slots, their capacity, and the layout that an engine is made for
- `token_sampling`: from logits to the next token
- `episodes`: the records of what was sampled
- `episode_sampler`: samples groups of episodes of prompts
- `slot_queue`: hands free slots to the next episodes
- `stop_strings`: ends episodes by their text
- `beam_search`: the completions of highest score
- `text_generator`: completions, chat turns and verdicts of one loaded model
"""
