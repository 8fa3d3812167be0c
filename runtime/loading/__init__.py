"""Opens what a spec names, and writes models out.

- `initial_weights`: the weights that a stage starts from, adapters included.
- `model_export`: models as `transformers` loads them, adapters as PEFT does.
- `pretrained`: published weights, read from safetensors to where they lie.
- `resources`: data, tokenizers and models of a spec, opened on first use and shared.
- `stored_tensors`: the tensors that each model family stores its parameters as.
- `weight_merging`: several models merged tensor by tensor.
"""
