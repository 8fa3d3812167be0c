"""Folders of safetensors: what is read back is what was written, and what is wrong is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from tunelang.compiler.models.families import BadConfigError, UnknownFamilyError, architecture_of
from tunelang.runtime.loading import pretrained
from tunelang.runtime.loading.stored_tensors import tensors
from tunelang.runtime.models.decoder import Decoder
from tunelang.runtime.models.model_folder import BadWeightsError, read_config
from tunelang.runtime.sharding import make_layout, shardings

CONFIG: dict[str, Any] = {
    "model_type": "qwen3", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64, "rope_theta": 1e6,
}  # fmt: skip
ONE = "model.safetensors"


@pytest.fixture(scope="module")
def params() -> Any:
    return nnx.split(Decoder(architecture_of(CONFIG), nnx.Rngs(0)))[1]


@pytest.fixture
def folder(tmp_path: Path, params: Any) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(dict(tensors(params, CONFIG)), tmp_path / ONE)
    return tmp_path


def read(folder: Path, **mesh: int) -> Any:
    return pretrained.load(folder, architecture_of(CONFIG), make_layout(**mesh))


def same(found: Any, expected: Any) -> None:
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("mesh", [{}, {"fsdp": 2, "tensor": 2}])
def test_what_was_written_is_read(folder: Path, params: Any, mesh: dict[str, int]) -> None:
    found = read(folder, **mesh)
    same(found, params)
    places = shardings(params, make_layout(**mesh))
    for one, place in zip(jax.tree.leaves(found), jax.tree.leaves(places), strict=True):
        assert one.sharding.is_equivalent_to(place, one.ndim)


def test_several_files_in_bfloat16(folder: Path, params: Any) -> None:
    tensors = {n: a.astype(ml_dtypes.bfloat16) for n, a in load_file(folder / ONE).items()}
    (folder / ONE).unlink()
    names = sorted(tensors)
    parts = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    where = {name: file for file, part in parts.items() for name in part}
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    same(read(folder), jax.tree.map(lambda a: a.astype(jnp.bfloat16).astype(jnp.float32), params))
    (folder / "two.safetensors").unlink()
    with pytest.raises(BadWeightsError) as caught:
        read(folder)
    assert caught.value.problems == ("`two.safetensors`: no such file",)


def test_every_tensor_at_fault_is_named(folder: Path) -> None:
    tensors = load_file(folder / ONE)
    del tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((24, 15), np.float32)
    tensors["vision.patch.weight"] = np.zeros(3, np.float32)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    save_file(tensors, folder / ONE)
    with pytest.raises(BadWeightsError) as caught:
        read(folder)
    assert caught.value.problems == (
        "missing: model.norm.weight",
        "left over: vision.patch.weight",
        "misshapen: model.layers.0.mlp.up_proj.weight is 24 × 15, not 24 × 16",
    )


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"", "cannot be read"), (b"0" * 100, "cannot be read"), (None, "no such file")],
)
def test_a_damaged_file(folder: Path, content: bytes | None, problem: str) -> None:
    (folder / ONE).unlink()
    if content is not None:
        (folder / ONE).write_bytes(content)
    with pytest.raises(BadWeightsError) as caught:
        read(folder)
    assert problem in caught.value.problems[0]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"model_type": "mamba"}, UnknownFamilyError, "no family `mamba`: there is llama, mistral"),
        ({"hidden_size": None}, BadConfigError, "config.json"),
        ({"num_key_value_heads": 3}, BadConfigError, "4 heads do not divide into 3 kv_heads"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, BadConfigError, "no rotary scaling"),
    ],
)
def test_a_configuration_that_cannot_be_used(
    change: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        architecture_of({**CONFIG, **change})
    lacking = {name: value for name, value in CONFIG.items() if name != "vocab_size"}
    with pytest.raises(BadConfigError, match="lacks `vocab_size`"):
        architecture_of(lacking)


def test_a_configuration_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadWeightsError, match="no such file"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(BadWeightsError, match="not an object"):
        read_config(tmp_path)
