"""Stages that start from a folder of weights, against the weights; folders that cannot be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.pipeline import tiny
from tunelang.compiler.models.families import architecture_of
from tunelang.runtime.loading.stored_tensors import tensors
from tunelang.runtime.models.decoder import Decoder

SPEC = """\
run { seed = 3, track = [] }

model small : pretrained { path = "small" }

data sums : jsonl {
  path     = "sums.jsonl"
  prompt   = "{a}+{b}="
  response = "{c}"
  target   = "{c}"
}

reward correct = numeric_match("{completion}", "{target}")
eval fluency : perplexity { data = sums }

stage baseline : sft {
  from      = small
  data      = sums
  length    = 2 steps
  batch     = 4 sequences
  optimizer = adamw(lr = 1e-2)
  evals     = [fluency]
  mesh      = axes(data = 1)
}

stage specialist : grpo {
  from      = small
  data      = sums
  reward    = correct
  group     = 2
  batch     = 2 prompts
  length    = 1 step
  rollout   = sampling(max_tokens = 4)
  kl        = k3(0.1)
  optimizer = adamw(lr = 1e-3)
  mesh      = axes(data = 1)
}
"""
CONFIG: dict[str, Any] = {
    "model_type": "gemma2", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    "max_position_embeddings": 32, "sliding_window": 6, "query_pre_attn_scalar": 8,
    "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
}  # fmt: skip


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    """The spec of a workspace with a small random model."""
    return workspace(tmp_path)


def workspace(tmp_path: Path) -> Path:
    """Write a spec, its data and a small random model with a tokenizer; returns the spec's path."""
    tiny.workspace(tmp_path)
    small = tmp_path / "small"
    small.mkdir()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([(tmp_path / "prose.txt").read_text()], trainer)
    tokenizer.save(str(small / "tokenizer.json"))
    (small / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>"})
    )
    config = {**CONFIG, "vocab_size": tokenizer.get_vocab_size()}
    (small / "config.json").write_text(json.dumps(config))
    _, params = nnx.split(Decoder(architecture_of(config), nnx.Rngs(0)))
    save_file(dict(tensors(params, config)), small / "model.safetensors")
    path = tmp_path / "pretrained.tune"
    path.write_text(SPEC)
    return path


def test_stages_start_from_the_weights_of_the_folder(spec: Path) -> None:
    recorder = tiny.run(spec)
    assert recorder.lines == ["baseline done", "specialist done"]
    prepared, store = tiny.plan(spec)
    assert {stage.state.kind for stage in prepared.plan.stages} == {"up to date"}
    rows = store.folder(prepared.plan.by_node["specialist"].digest).metrics().rows
    (row,) = [row for row in rows if "loss" in row]
    # The reference is the folder's model, which is what samples in the first step.
    assert abs(row["kl"]) < 1e-6
    assert row["mismatch_max"] < 1e-4

    # Other weights in the folder: another result.
    file = spec.parent / "small" / "model.safetensors"
    tensors = load_file(file)
    save_file({n: a * np.float32(1.5) for n, a in tensors.items()}, file)
    prepared, _ = tiny.plan(spec)
    assert {stage.state.kind for stage in prepared.plan.stages} == {"to run"}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda small: (small / "model.safetensors").unlink(), "`model.safetensors`: no such file"),
        (
            lambda small: (small / "config.json").write_text('{"model_type": "mamba"}'),
            "there is no family `mamba`",
        ),
    ],
    ids=["weights", "family"],
)
def test_unusable_folder_is_an_error(spec: Path, damage: Any, words: str) -> None:
    damage(spec.parent / "small")
    done = tiny.tune("run", spec)
    assert done.returncode == 3, done.stderr
    assert "error[weights-fail]" in done.stderr
    assert words in done.stderr
    assert "pretrained.tune:3:35" in done.stderr
