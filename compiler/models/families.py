"""The families of published checkpoints: their configurations and the names of their tensors.

A family is a row: how its configuration becomes an `Architecture`, and where the names of its
tensors differ from Llama's. Names map one to one, so that the same table reads and writes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from typing_extensions import override

from tunelang.compiler.models.architecture import (
    Architecture,
    LinearScaling,
    Llama3Scaling,
    Mixture,
    RopeScaling,
    Span,
    plain,
)
from tunelang.dsl.diagnostics.tune_error import FailureText, SpecPlace, TuneError
from tunelang.dsl.messages import run_failures

Config = Mapping[str, Any]
Fields = dict[str, Any]

_LLAMA = {
    "embedding": "model.embed_tokens.weight",
    "blocks.attention_norm.scale": "model.layers.{}.input_layernorm.weight",
    "blocks.attention.q.weight": "model.layers.{}.self_attn.q_proj.weight",
    "blocks.attention.q.bias": "model.layers.{}.self_attn.q_proj.bias",
    "blocks.attention.k.weight": "model.layers.{}.self_attn.k_proj.weight",
    "blocks.attention.k.bias": "model.layers.{}.self_attn.k_proj.bias",
    "blocks.attention.v.weight": "model.layers.{}.self_attn.v_proj.weight",
    "blocks.attention.v.bias": "model.layers.{}.self_attn.v_proj.bias",
    "blocks.attention.o.weight": "model.layers.{}.self_attn.o_proj.weight",
    "blocks.attention.o.bias": "model.layers.{}.self_attn.o_proj.bias",
    "blocks.attention.q_norm.scale": "model.layers.{}.self_attn.q_norm.weight",
    "blocks.attention.k_norm.scale": "model.layers.{}.self_attn.k_norm.weight",
    "blocks.mlp_norm.scale": "model.layers.{}.post_attention_layernorm.weight",
    "blocks.mlp.gate.weight": "model.layers.{}.mlp.gate_proj.weight",
    "blocks.mlp.gate.bias": "model.layers.{}.mlp.gate_proj.bias",
    "blocks.mlp.up.weight": "model.layers.{}.mlp.up_proj.weight",
    "blocks.mlp.up.bias": "model.layers.{}.mlp.up_proj.bias",
    "blocks.mlp.down.weight": "model.layers.{}.mlp.down_proj.weight",
    "blocks.mlp.down.bias": "model.layers.{}.mlp.down_proj.bias",
    "blocks.mlp.router": "model.layers.{}.mlp.gate.weight",
    "blocks.mlp.experts.gate": "model.layers.{}.mlp.experts.{}.gate_proj.weight",
    "blocks.mlp.experts.up": "model.layers.{}.mlp.experts.{}.up_proj.weight",
    "blocks.mlp.experts.down": "model.layers.{}.mlp.experts.{}.down_proj.weight",
    "norm.scale": "model.norm.weight",
    "head": "lm_head.weight",
}
"""Path of a parameter -> name of its tensor; `{}` is the layer."""

_NORMS_ON_BOTH_SIDES = {
    "blocks.attention_out_norm.scale": "model.layers.{}.post_attention_layernorm.weight",
    "blocks.mlp_norm.scale": "model.layers.{}.pre_feedforward_layernorm.weight",
    "blocks.mlp_out_norm.scale": "model.layers.{}.post_feedforward_layernorm.weight",
}


_NORMS_BEHIND = {
    "blocks.attention_out_norm.scale": "model.layers.{}.post_attention_layernorm.weight",
    "blocks.mlp_out_norm.scale": "model.layers.{}.post_feedforward_layernorm.weight",
}

_FUSED = {
    "blocks.attention.q.weight": "model.layers.{}.self_attn.qkv_proj.weight",
    "blocks.attention.k.weight": "model.layers.{}.self_attn.qkv_proj.weight",
    "blocks.attention.v.weight": "model.layers.{}.self_attn.qkv_proj.weight",
    "blocks.mlp.gate.weight": "model.layers.{}.mlp.gate_up_proj.weight",
    "blocks.mlp.up.weight": "model.layers.{}.mlp.gate_up_proj.weight",
}


@dataclass(frozen=True)
class Family:
    """A row of the table."""

    choices: Callable[[Config], Fields]
    """Returns the fields of the architecture that differ from Llama's."""
    tied: bool = False
    """Whether the head is the embedding if the configuration does not say."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Names of tensors that differ from Llama's."""


class UnknownFamilyError(Exception):
    """A `config.json` of a `model_type` that is not in the table, whose names are `known`."""

    def __init__(self, model_type: str, known: tuple[str, ...]) -> None:
        super().__init__(f"there is no family `{model_type}`: there is {', '.join(known)}")
        self.model_type, self.known = model_type, known


class UndescribedError(TuneError):
    """No family in the table has the architecture."""

    code = "export-fails"

    @override
    def text(self, stage: str) -> FailureText:
        return run_failures.no_family()

    @override
    def place(self) -> SpecPlace:
        return SpecPlace(attribute="from")


class BadConfigError(Exception):
    """A `config.json` that lacks a key, or describes a feature that the decoder does not have."""


def architecture_of(config: Config) -> Architecture:
    """Return the architecture that a `config.json` describes.

    Raises `UnknownFamilyError` and `BadConfigError`.
    """
    family = family_of(config)
    try:
        heads, width = config["num_attention_heads"], config["hidden_size"]
        values = {
            "vocabulary": config["vocab_size"],
            "layers": config["num_hidden_layers"],
            "width": width,
            "heads": heads,
            "kv_heads": config.get("num_key_value_heads") or heads,
            "head_dim": config.get("head_dim") or width // heads,
            "mlp": config["intermediate_size"],
            "context": config["max_position_embeddings"],
            "norm_epsilon": config.get("rms_norm_eps", 1e-6),
            "tied": config.get("tie_word_embeddings", family.tied),
            **_rope(config),
            **family.choices(config),
        }
        return Architecture(**values)
    except KeyError as error:
        raise BadConfigError(f"`config.json` lacks `{error.args[0]}`") from None
    except (TypeError, ValueError) as error:
        raise BadConfigError(f"`config.json`: {error}") from None


def family_of(config: Config) -> Family:
    """Return the row of a configuration; raises `UnknownFamilyError`."""
    name = str(config.get("model_type", ""))
    if name not in FAMILIES:
        raise UnknownFamilyError(name, tuple(FAMILIES))
    return FAMILIES[name]


def names_of(family: Family) -> dict[str, str]:
    """Return path of a parameter -> name of its tensor, `{}` for the layer and the expert.

    Parameters that share a tensor are concatenated along its first axis in this order.
    """
    return {**_LLAMA, **family.names}


def config_of(architecture: Architecture) -> Fields:
    """Return a `config.json` that describes an architecture; raises `UndescribedError`."""
    a = architecture
    local = a.pattern == ("local",)
    common = {
        "vocab_size": a.vocabulary,
        "num_hidden_layers": a.layers,
        "hidden_size": a.width,
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads,
        "head_dim": a.head_dim,
        "intermediate_size": a.mlp,
        "max_position_embeddings": a.context,
        "rms_norm_eps": a.norm_epsilon,
        "tie_word_embeddings": a.tied,
        "rope_theta": a.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": a.rope_base},
        "hidden_act": "silu",
    }
    spans = ["sliding_attention"] * a.layers
    windows = {"use_sliding_window": True, "sliding_window": a.window, "layer_types": spans}
    trials: list[Fields] = [
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
        {
            "model_type": "mistral",
            "architectures": ["MistralForCausalLM"],
            "sliding_window": a.window,
        },
        {
            "model_type": "qwen3",
            "architectures": ["Qwen3ForCausalLM"],
            **(windows if local else {}),
        },
    ]
    for trial in trials:
        config = {**common, **trial}
        if architecture_of(config) == replace(plain(a), dropout=0.0):
            return config
    raise UndescribedError


# Configurations.


def _rope(config: Config) -> Fields:
    """Read the base and scaling of rotary embeddings, as old and new configurations have them."""
    stated: Config = config.get("rope_parameters") or {}
    global_layers: Config = stated.get("full_attention") or stated
    local_layers: Config | None = stated.get("sliding_attention")
    scaling = global_layers or config.get("rope_scaling") or {}
    fields = {
        "rope_base": float(global_layers.get("rope_theta", config.get("rope_theta", 10_000.0))),
        "rope_scaling": _scaling(scaling),
    }
    base = (
        config.get("rope_local_base_freq") if local_layers is None else local_layers["rope_theta"]
    )
    if base is not None:
        fields["rope_local_base"] = float(base)
    return fields


def _scaling(stated: Config) -> RopeScaling | None:
    kind = stated.get("rope_type", stated.get("type", "default"))
    match kind:
        case "default":
            return None
        case "linear":
            return LinearScaling(factor=float(stated["factor"]))
        case "llama3":
            return Llama3Scaling(
                factor=float(stated["factor"]),
                low_frequency=float(stated["low_freq_factor"]),
                high_frequency=float(stated["high_freq_factor"]),
                original_context=int(stated["original_max_position_embeddings"]),
            )
    raise ValueError(f"the decoder has no rotary scaling `{kind}`")


def _biases(config: Config) -> Fields:
    attention = bool(config.get("attention_bias", False))
    return {
        "qkv_bias": attention,
        "output_bias": attention,
        "mlp_bias": bool(config.get("mlp_bias", False)),
    }


def _windows(config: Config, spans: tuple[Span, ...]) -> Fields:
    """Read the shortest pattern of local and global layers; `spans` where none is stated."""
    window = config.get("sliding_window")
    if window is None:
        return {}
    stated = config.get("layer_types")
    if stated is not None:
        spans = tuple("local" if layer == "sliding_attention" else "global" for layer in stated)
    period = next(
        n
        for n in range(1, len(spans) + 1)
        if all(span == spans[layer % n] for layer, span in enumerate(spans))
    )
    pattern = spans[:period]
    return {"pattern": pattern, "window": window} if "local" in pattern else {}


def _llama(config: Config) -> Fields:
    return _biases(config)


def _mistral(config: Config) -> Fields:
    return _windows(config, ("local",))


def _qwen2(config: Config) -> Fields:
    windows = _windows(config, ("global",)) if config.get("use_sliding_window") else {}
    return {"qkv_bias": True, **windows}


def _qwen3(config: Config) -> Fields:
    windows = _windows(config, ("global",)) if config.get("use_sliding_window") else {}
    return {"qk_norm": True, **_biases(config), **windows}


def _qwen3_moe(config: Config) -> Fields:
    if config.get("decoder_sparse_step", 1) != 1 or config.get("mlp_only_layers"):
        raise ValueError("the decoder has no mixture of layers with and without experts")
    return {
        **_qwen3(config),
        "experts": Mixture(
            # Renamed in transformers 5.
            count=config.get("num_local_experts") or config["num_experts"],
            active=config["num_experts_per_tok"],
            width=config["moe_intermediate_size"],
            balance=config.get("router_aux_loss_coef", 1e-3),
            normalised=bool(config.get("norm_topk_prob", False)),
        ),
    }


def _olmo2(config: Config) -> Fields:
    return {
        "norm_placement": "post",
        "qk_norm": True,
        "qk_norm_joint": True,
        "qkv_bias": bool(config.get("attention_bias", False)),
        "output_bias": bool(config.get("attention_bias", False)),
    }


def _phi3(config: Config) -> Fields:
    stated = config.get("rope_parameters") or {}
    share = stated.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if share != 1.0:
        raise ValueError("the decoder has no rotation of a part of a head")
    return _windows(config, ("local",))


def _gemma(config: Config) -> Fields:
    return {
        "activation": "geglu",
        "norm_unit_offset": True,
        "embedding_scale": math.sqrt(config["hidden_size"]),
        "qkv_bias": bool(config.get("attention_bias", False)),
    }


def _gemma2(config: Config) -> Fields:
    return {
        **_gemma(config),
        "norm_placement": "both",
        "query_scale": config["query_pre_attn_scalar"] ** -0.5,
        "attention_cap": config.get("attn_logit_softcapping"),
        "logit_cap": config.get("final_logit_softcapping"),
        **_windows(config, ("local", "global")),
    }


def _gemma3(config: Config) -> Fields:
    period = config.get("sliding_window_pattern", 6)
    return {
        **_gemma2(config),
        "qk_norm": True,
        **_windows(config, ("local",) * (period - 1) + ("global",)),
    }


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": Family(_llama),
        "mistral": Family(_mistral),
        "qwen2": Family(_qwen2),
        "qwen3": Family(_qwen3),
        "qwen3_moe": Family(_qwen3_moe),
        "olmo2": Family(_olmo2, names=_NORMS_BEHIND),
        "phi3": Family(_phi3, names=_FUSED),
        "gemma": Family(_gemma, tied=True),
        "gemma2": Family(_gemma2, tied=True, names=_NORMS_ON_BOTH_SIDES),
        "gemma3_text": Family(_gemma3, tied=True, names=_NORMS_ON_BOTH_SIDES),
    }
)
"""`model_type` of a `config.json` -> family."""
