"""The decoder, its layers, and its parameters.

- `attention`: causal attention, by XLA or by kernels, of sequences, shared prompts and caches.
- `decode_step`: one token for each slot of the cache.
- `decoder`: the network of every architecture.
- `fused_attention`: kernels that never hold all logits, over devices and branches of a sweep.
- `kv_cache`: keys and values of the tokens so far.
- `layers`: projections, normalisation, attention heads, feed-forward, the block of them.
- `loaded_model`: a declared model, opened.
- `lora`: adapters.
- `matmul`: matrix products with cheaper gradients on CPUs.
- `model_folder`: folders of published models, and the architectures that they describe.
- `moe`: mixtures of experts, and their load-balance loss.
- `parameters`: parameters as trees: merged, split into trained and frozen, named by path.
- `primitives`: parameters with named axes, random weights, activations, dropout.
- `quantization`: frozen matrices in four or eight bits.
- `remat`: the values that a layer computes again in its backward pass.
- `rope`: rotary position embeddings.
"""
