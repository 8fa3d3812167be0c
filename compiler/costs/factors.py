"""Fitted factors of the memory estimate, by compiler.

The factors of GPUs and TPUs are fitted by least squares to the peaks that XLA's compilers report
for 665 training programs (2026-11-22, jax 0.10.2; the points are in `benchmarks/RESULTS.md`), by

    python benchmarks/plan_accuracy.py --out points.jsonl
    python benchmarks/plan_accuracy.py --fit points.jsonl

Those of CPUs are rough: they only rank layouts.

A factor says how many copies of an array are live when the peak is reached. Those of a layer's
backward pass have a prefix for the weights below: `trained`, `lora` (frozen, in float) or `qlora`
(frozen and quantised).

| factor | array |
|---|---|
| `*_width` | activations of a layer as wide as the residual stream |
| `*_hidden` | hidden units of the feed-forward layer |
| `*_gathered_block` | matrices of a layer, gathered over the mesh or dequantised |
| `*_head_copies_in_backward` | the gathered output head, still held in the backward pass |
| `geglu`, `geglu_on_<chip>` | hidden units with that activation, against a SwiGLU's |
| `attention_heads` | queries, keys and values |
| `attention_scores` | logits of attention, where the kernel holds them |
| `attention_mask` | the mask that cuDNN's kernel reads |
| `cast_weights` | trained weights cast to bfloat16 ahead of the layers (TPU) |
| `vector_memory` | a TPU core's vector memory, which takes what is small and used soon |
| `logits`, `frozen_head_logits` | float32 logits of a chunk, by whether the head is trained |
| `hidden_states` | the decoder's output, which the loss reads |
| `gathered_head` | the output head, gathered in the activations' dtype |
| `head_gradient` | the head's float32 gradient |
| `summed_head_gradient` | the same where gradients of micro-batches are summed |
| `transposed_table` | a trained table whose part in a device is transposed (TPU) |
"""

from __future__ import annotations

Factors = dict[str, float]

FACTORS: dict[str, Factors] = {
    "gpu": {
        "trained_width": 8.85,
        "trained_hidden": 0.69,
        "trained_gathered_block": 0.61,
        "trained_head_copies_in_backward": 1.42,
        "lora_width": 8.05,
        "lora_hidden": 1.57,
        "lora_gathered_block": 1.02,
        "lora_head_copies_in_backward": 0.1,
        "qlora_width": 6.25,
        "qlora_hidden": 1.52,
        "qlora_gathered_block": 1.13,
        "qlora_head_copies_in_backward": 0.33,
        "geglu": 1.63,
        "attention_heads": 2.57,
        "attention_scores": 3.38,
        "attention_mask": 1.84,
        "logits": 1.79,
        "frozen_head_logits": 1.76,
        "hidden_states": 1.31,
        "gathered_head": 1.39,
        "head_gradient": 1.13,
        "summed_head_gradient": 1.23,
    },
    "tpu": {
        "trained_width": 5.64,
        "trained_hidden": 1.52,
        "trained_gathered_block": 0.72,
        "trained_head_copies_in_backward": 0.13,
        "lora_width": 7.13,
        "lora_hidden": 1.53,
        "lora_gathered_block": 1.13,
        "lora_head_copies_in_backward": 0.07,
        "qlora_width": 7.48,
        "qlora_hidden": 1.63,
        "qlora_gathered_block": 0.73,
        "qlora_head_copies_in_backward": 0.04,
        "geglu_on_v5e": 1.25,
        "attention_heads": 2.5,
        "attention_scores": 4.5,
        "attention_mask": 0.5,
        "cast_weights": 0.87,
        "vector_memory": 0.36,
        "logits": 1.16,
        "frozen_head_logits": 0.55,
        "hidden_states": 1.19,
        "gathered_head": 1.04,
        "head_gradient": 0.84,
        "summed_head_gradient": 1.11,
        "transposed_table": 0.68,
    },
    "cpu": {
        "trained_width": 8.0,
        "trained_hidden": 3.0,
        "trained_gathered_block": 2.0,
        "trained_head_copies_in_backward": 1.0,
        "lora_width": 8.0,
        "lora_hidden": 3.5,
        "lora_gathered_block": 2.0,
        "lora_head_copies_in_backward": 1.0,
        "qlora_width": 8.0,
        "qlora_hidden": 3.0,
        "qlora_gathered_block": 2.0,
        "qlora_head_copies_in_backward": 1.0,
        "attention_heads": 3.0,
        "attention_scores": 4.5,
        "attention_mask": 0.5,
        "logits": 3.0,
        "frozen_head_logits": 3.0,
        "hidden_states": 2.0,
        "gathered_head": 1.0,
        "head_gradient": 1.0,
        "summed_head_gradient": 1.0,
    },
}
