"""Logits and gradients of an exported random adapter against PEFT."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.parity.test_transformers import save_random_model
from tunelang.compiler.models.adapters import adapted
from tunelang.compiler.models.families import architecture_of
from tunelang.dsl.vocabulary.training import Dora, Lora
from tunelang.dsl.vocabulary.utility_stages import Export
from tunelang.runtime.loading import initial_weights, pretrained
from tunelang.runtime.loading import model_export as exporting
from tunelang.runtime.loading.stored_tensors import adapter_tensors
from tunelang.runtime.models.loaded_model import Model
from tunelang.runtime.models.model_folder import read_config
from tunelang.runtime.models.parameters import abstract_decoder, merge_params, split_trainable
from tunelang.runtime.sharding import make_layout
from tunelang.runtime.tokenize.chat_renderer import Renderer
from tunelang.runtime.tokenize.chat_templates import chat_template
from tunelang.runtime.tokenize.tokenizers import Bytes
from tunelang.runtime.training.objective import Batch, summed_loss
from tunelang.runtime.training.step_config import StepConfig

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

ADAPTERS: dict[str, tuple[str, Lora]] = {
    "lora": ("llama 3", Lora(rank=3, alpha=5.0)),
    "rslora": ("gemma 2, one key", Lora(rank=4, alpha=8.0, rank_stabilized=True)),
    "dora": ("qwen 2", Dora(rank=2, alpha=3.0, targets=("attention", "down"))),
    "embedding and head": ("llama 3", Lora(rank=2, targets=("embed", "head", "q"))),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter_logits_and_gradients_equal_peft(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, lora = ADAPTERS[name]
    base, out = tmp_path / "base", tmp_path / "adapter"
    tokens, _ = save_random_model(case, base)
    config = read_config(base)
    plain = architecture_of(config)
    architecture = adapted(plain, (lora,), "f32")
    layout = make_layout()
    base_params = pretrained.load(base, plain, layout)
    model = Model("m", plain, Renderer(Bytes(), chat_template(None)), jnp.float32, "f32", base)
    # Random in both halves, or half of the gradients would be zero.
    params = initial_weights._add_adapter(base_params, architecture, layout, jnp.float32, 5)
    adapter_params, frozen = split_trainable(architecture, params)
    keys = iter(jax.random.split(jax.random.key(1), 99))
    adapter_params = jax.tree.map(
        lambda a: a + 0.1 * jax.random.normal(next(keys), a.shape), adapter_params
    )

    monkeypatch.setattr(exporting, "load_params", lambda *_: adapter_params)
    origin = initial_weights.Origin("m", None, ((lora, tmp_path),))
    exporting.export_model(origin, Export.unvalidated(adapter="apart"), model, layout, out, "x")

    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        base, attn_implementation="eager", dtype=torch.float32
    )
    theirs = peft.PeftModel.from_pretrained(theirs, out, is_trainable=True)
    labels = torch.tensor(tokens).long()
    result = theirs(input_ids=labels, labels=labels)
    result.loss.backward()

    graph, _ = abstract_decoder(architecture, jnp.float32)
    decoder = nnx.merge(graph, merge_params(adapter_params, frozen))
    logits = decoder.logits(decoder(jnp.asarray(tokens))[0])
    np.testing.assert_allclose(logits, result.logits.detach().numpy(), atol=1e-4)

    batch = Batch(jnp.asarray(tokens, jnp.int32), jnp.ones(tokens.shape, bool))
    count = tokens.shape[0] * (tokens.shape[1] - 1)

    def loss(adapter_params: Any) -> jax.Array:
        decoder = nnx.merge(graph, merge_params(adapter_params, frozen))
        return summed_loss(decoder, batch, None, StepConfig(layout=layout, chunk=8)) / count

    value, gradient = jax.value_and_grad(loss)(adapter_params)
    assert abs(float(value) - float(result.loss)) < 1e-5
    expected = {
        n.replace(".default", "").replace(".weight", ""): p.grad.numpy()
        for n, p in theirs.named_parameters() if p.grad is not None
    }  # fmt: skip
    gradients = {
        f"base_model.model.{module}.{part}".replace(".weight", ""): array
        for module, part, array in adapter_tensors(gradient, config)
    }
    assert gradients.keys() == expected.keys()
    for key, array in gradients.items():
        scale = max(1.0, np.abs(expected[key]).max())
        np.testing.assert_allclose(array / scale, expected[key] / scale, atol=1e-4, err_msg=key)

    # Merged, they are the same function.
    merged = initial_weights.merge_adapters(
        merge_params(adapter_params, frozen), architecture, layout, jnp.float32
    )
    merged_decoder = nnx.merge(abstract_decoder(replace(plain), jnp.float32)[0], merged)
    np.testing.assert_allclose(
        merged_decoder.logits(merged_decoder(jnp.asarray(tokens))[0]), logits, atol=2e-4
    )


def test_export_apart_without_one_adapter_is_an_error(tmp_path: Path) -> None:
    model: Any = SimpleNamespace(folder=tmp_path)
    lora = Lora()
    for origin in (
        initial_weights.Origin("m", tmp_path),
        initial_weights.Origin("m", tmp_path, ((lora, tmp_path),)),
        initial_weights.Origin("m", None, ((lora, tmp_path), (lora, tmp_path))),
    ):
        with pytest.raises(exporting.NotApartError):
            exporting.export_model(
                origin,
                Export.unvalidated(adapter="apart"),
                model,
                make_layout(),
                tmp_path / "x",
                "x",
            )
