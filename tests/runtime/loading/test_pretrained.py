"""Folders of safetensors: loaded weights against the written ones; errors of damaged folders."""

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
WEIGHTS_FILE = "model.safetensors"


@pytest.fixture(scope="module")
def params() -> Any:
    """Random parameters of the architecture of `CONFIG`."""
    return nnx.split(Decoder(architecture_of(CONFIG), nnx.Rngs(0)))[1]


@pytest.fixture
def folder(tmp_path: Path, params: Any) -> Path:
    """A folder with `params` and their configuration."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(dict(tensors(params, CONFIG)), tmp_path / WEIGHTS_FILE)
    return tmp_path


def load_folder(folder: Path, **mesh: int) -> Any:
    """Load the weights of a folder onto a mesh."""
    return pretrained.load(folder, architecture_of(CONFIG), make_layout(**mesh))


def assert_trees_equal(actual: Any, expected: Any) -> None:
    """Assert that the arrays of two trees are equal."""
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("mesh", [{}, {"fsdp": 2, "tensor": 2}])
def test_loaded_weights_equal_the_written_ones(
    folder: Path, params: Any, mesh: dict[str, int]
) -> None:
    loaded = load_folder(folder, **mesh)
    assert_trees_equal(loaded, params)
    places = shardings(params, make_layout(**mesh))
    for leaf, place in zip(jax.tree.leaves(loaded), jax.tree.leaves(places), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)


def test_weights_in_several_bfloat16_files_are_loaded(folder: Path, params: Any) -> None:
    tensors = {n: a.astype(ml_dtypes.bfloat16) for n, a in load_file(folder / WEIGHTS_FILE).items()}
    (folder / WEIGHTS_FILE).unlink()
    names = sorted(tensors)
    parts = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_trees_equal(
        load_folder(folder),
        jax.tree.map(lambda a: a.astype(jnp.bfloat16).astype(jnp.float32), params),
    )
    (folder / "two.safetensors").unlink()
    with pytest.raises(BadWeightsError) as caught:
        load_folder(folder)
    assert caught.value.problems == ("`two.safetensors`: no such file",)


def test_error_names_every_wrong_tensor(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    del tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((24, 15), np.float32)
    tensors["vision.patch.weight"] = np.zeros(3, np.float32)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    save_file(tensors, folder / WEIGHTS_FILE)
    with pytest.raises(BadWeightsError) as caught:
        load_folder(folder)
    assert caught.value.problems == (
        "missing: model.norm.weight",
        "left over: vision.patch.weight",
        "misshapen: model.layers.0.mlp.up_proj.weight is 24 × 15, not 24 × 16",
    )


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"", "cannot be read"), (b"0" * 100, "cannot be read"), (None, "no such file")],
)
def test_damaged_file_is_an_error(folder: Path, content: bytes | None, problem: str) -> None:
    (folder / WEIGHTS_FILE).unlink()
    if content is not None:
        (folder / WEIGHTS_FILE).write_bytes(content)
    with pytest.raises(BadWeightsError) as caught:
        load_folder(folder)
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
def test_unusable_configuration_is_an_error(
    change: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        architecture_of({**CONFIG, **change})
    incomplete = {name: value for name, value in CONFIG.items() if name != "vocab_size"}
    with pytest.raises(BadConfigError, match="lacks `vocab_size`"):
        architecture_of(incomplete)


def test_missing_configuration_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BadWeightsError, match="no such file"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(BadWeightsError, match="not an object"):
        read_config(tmp_path)
