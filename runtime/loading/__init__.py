"""Opens what a spec names, and writes models out.

- `resources`: data, tokenizers and models of a spec, opened on first use and shared.
- `initial_weights`: the weights that a stage starts from, adapters included.
- `weight_merging`: several models merged tensor by tensor.
- `model_export`: models as `transformers` loads them, adapters as PEFT does.
"""
