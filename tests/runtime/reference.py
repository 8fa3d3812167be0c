"""A second decoder in numpy and float64: plain loops over layers, heads and tokens.

It shares nothing with the decoder but the parameters.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tunelang.compiler.models.architecture import Architecture, LinearScaling


def arrays(state: Any) -> Any:
    """Turn parameters into nested dictionaries of float64."""
    if hasattr(state, "items"):
        return {name: arrays(value) for name, value in state.items()}
    return np.asarray(state.get_value(), np.float64)


def norm(a: Architecture, weights: dict, x: np.ndarray) -> np.ndarray:
    """Normalize the axes of the scale."""
    axes = tuple(range(-weights["scale"].ndim, 0))
    if a.norm == "layer":
        x = x - x.mean(axes, keepdims=True)
    x = x / np.sqrt((x**2).mean(axes, keepdims=True) + a.norm_epsilon)
    x = x * (weights["scale"] + (1 if a.norm_unit_offset else 0))
    return x + weights["bias"] if a.norm == "layer" else x


def linear(weights: dict, x: np.ndarray, contracted: int = 1) -> np.ndarray:
    """Multiply by a matrix over the last `contracted` axes, and add a bias."""
    return np.tensordot(x, weights["weight"], contracted) + weights.get("bias", 0)


def frequency(a: Architecture, local: bool, i: int) -> float:
    """Compute the angle by which pair `i` turns from one position to the next."""
    base, scaling = a.rope_base, a.rope_scaling
    if local and a.rope_local_base is not None:
        base, scaling = a.rope_local_base, None
    plain = base ** (-2 * i / a.head_dim)
    if scaling is None:
        return plain
    if isinstance(scaling, LinearScaling):
        return plain / scaling.factor
    wavelength = 2 * math.pi / plain
    if wavelength < scaling.original_context / scaling.high_frequency:
        return plain
    if wavelength > scaling.original_context / scaling.low_frequency:
        return plain / scaling.factor
    smooth = (scaling.original_context / wavelength - scaling.low_frequency) / (
        scaling.high_frequency - scaling.low_frequency
    )
    return (1 - smooth) * plain / scaling.factor + smooth * plain


def rotate(a: Architecture, local: bool, x: np.ndarray, position: int) -> np.ndarray:
    """Turn the heads `[heads, head_dim]` of one token."""
    if a.position != "rope":
        return x
    out, half = np.empty_like(x), a.head_dim // 2
    for i in range(half):
        angle = position * frequency(a, local, i)
        c, s = math.cos(angle), math.sin(angle)
        out[:, i] = x[:, i] * c - x[:, i + half] * s
        out[:, i + half] = x[:, i + half] * c + x[:, i] * s
    return out


def activate(name: str, x: np.ndarray) -> np.ndarray:
    """Apply an activation by its name."""
    if name == "relu":
        return np.maximum(x, 0)
    if name == "swiglu":
        return x / (1 + np.exp(-x))
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def attend(a: Architecture, local: bool, w: dict, x: np.ndarray) -> np.ndarray:
    """Attend within one sequence `[length, width]`."""
    q, k, v = (linear(w[name], x) for name in "qkv")
    if a.qk_norm:
        q, k = norm(a, w["q_norm"], q), norm(a, w["k_norm"], k)
    q = np.stack([rotate(a, local, vectors, t) for t, vectors in enumerate(q)])
    k = np.stack([rotate(a, local, vectors, t) for t, vectors in enumerate(k)])
    scale = a.head_dim**-0.5 if a.query_scale is None else a.query_scale
    out = np.zeros_like(q)
    for t in range(len(x)):
        first = max(0, t - a.window + 1) if local else 0
        for head in range(a.heads):
            group = head // (a.heads // a.kv_heads)
            logits = scale * k[first : t + 1, group] @ q[t, head]
            if a.attention_cap is not None:
                logits = a.attention_cap * np.tanh(logits / a.attention_cap)
            p = np.exp(logits - logits.max())
            out[t, head] = p / p.sum() @ v[first : t + 1, group]
    return linear(w["o"], out, 2)


def mixture(a: Architecture, w: dict, x: np.ndarray) -> np.ndarray:
    """Run each token through its experts, one after another."""
    out = np.zeros_like(x)
    for t, token in enumerate(x):
        logits = token @ w["router"]
        share = np.exp(logits - logits.max())
        share /= share.sum()
        chosen = np.argsort(-share)[: a.experts.active]
        total = share[chosen].sum() if a.experts.normalised else 1.0
        for e in chosen:
            expert = {name: {"weight": value[e]} for name, value in w["experts"].items()}
            out[t] += share[e] / total * feed_forward(a, expert, token[None])[0]
    return out


def feed_forward(a: Architecture, w: dict, x: np.ndarray) -> np.ndarray:
    """Run the feed-forward layer, dense or of experts."""
    if "router" in w:
        return mixture(a, w, x)
    up = linear(w["up"], x)
    hidden = (
        activate(a.activation, linear(w["gate"], x)) * up if a.gated else activate(a.activation, up)
    )
    return linear(w["down"], hidden)


def logits(a: Architecture, params: Any, tokens: np.ndarray) -> np.ndarray:
    """Compute the logits `[length, vocab]` of one sequence `[length]`."""
    w = arrays(params)
    x = w["embedding"][tokens] * a.embedding_scale
    if a.position == "learned":
        x = x + w["positions"][: len(tokens)]

    def maybe(block: dict, name: str, value: np.ndarray) -> np.ndarray:
        return norm(a, block[name], value) if name in block else value

    def layer_of(tree: Any, layer: int) -> Any:
        if isinstance(tree, dict):
            return {name: layer_of(value, layer) for name, value in tree.items()}
        return tree[layer]

    for layer in range(a.layers):
        block = layer_of(w["blocks"], layer)
        local = a.pattern[layer % len(a.pattern)] == "local"
        y = attend(a, local, block["attention"], maybe(block, "attention_norm", x))
        x = x + maybe(block, "attention_out_norm", y)
        y = feed_forward(a, block["mlp"], maybe(block, "mlp_norm", x))
        x = x + maybe(block, "mlp_out_norm", y)
    result = norm(a, w["norm"], x) @ w.get("head", w["embedding"]).T
    return result if a.logit_cap is None else a.logit_cap * np.tanh(result / a.logit_cap)
