"""Exported folders: their logits against the stage's, here, in `transformers` and in PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from tests.pipeline import tiny
from tests.pipeline.test_pretrained import workspace
from tests.pipeline.tiny import tune
from tunelang.compiler.models.families import architecture_of
from tunelang.runtime.commands.generate import open_generator
from tunelang.runtime.loading import pretrained
from tunelang.runtime.models.model_folder import read_config
from tunelang.runtime.models.parameters import abstract_decoder
from tunelang.runtime.sharding import make_layout

STAGES = """
stage tuned : sft {
  from      = small
  data      = sums
  length    = 2 steps
  batch     = 4 sequences
  adapter   = lora(rank = 2, targets = [all])
  optimizer = adamw(lr = 1e-1)
  mesh      = axes(data = 1)
}

stage release : export { from = tuned, path = "out", dtype = f32, shard = 8 KB }
stage light   : export { from = tuned, path = "light", adapter = apart }
"""


@pytest.fixture(scope="module")
def exported_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that exported merged weights and adapters."""
    spec = workspace(tmp_path_factory.mktemp("exported"))
    text = spec.read_text()
    spec.write_text(text[: text.index("stage baseline")] + STAGES)
    assert tiny.run(spec).lines == ["tuned done", "release done", "light done"]
    return spec


@pytest.fixture
def exported(exported_once: Path, tmp_path: Path) -> Path:
    """A copy of that run."""
    return tiny.copy(exported_once, tmp_path / "copy")


def logits_of(spec: Path, stage: str, tokens: np.ndarray) -> np.ndarray:
    """Compute logits by the model of a stage."""
    prepared, store = tiny.plan(spec)
    generator = open_generator(prepared.program, store, stage)
    graph, _ = abstract_decoder(generator.model.architecture, jnp.float32)
    decoder = nnx.merge(graph, generator.params)
    return np.asarray(decoder.logits(decoder(jnp.asarray(tokens))[0]))


def test_exported_folder_is_a_model_of_another_spec(exported: Path) -> None:
    out = exported.parent / "out"
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 2
    config = read_config(out)
    architecture = architecture_of(config)
    params = pretrained.load(out, architecture, make_layout())
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
    graph, _ = abstract_decoder(architecture, jnp.float32)
    decoder = nnx.merge(graph, params)
    actual = decoder.logits(decoder(jnp.asarray(tokens))[0])
    # Merged on another mesh, where sums have another order.
    np.testing.assert_allclose(actual, logits_of(exported, "tuned", tokens), atol=1e-4)
    # And it is a model of another spec.
    text = exported.read_text()
    other = exported.with_name("other.tune")
    other.write_text(
        text[: text.index("stage tuned")].replace('"small"', '"out"')
        + """
stage more : sft {
  from = small
  data = sums
  length = 1 step
  batch = 4 sequences
  mesh = axes(data = 1)
}
"""
    )
    assert tiny.run(other).lines == ["more done"]


def test_export_leaves_other_files_alone(exported: Path) -> None:
    out = exported.parent / "out"
    (out / "notes.txt").write_text("mine")
    written = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    again = tiny.run(exported)
    assert again.lines == [f"{name} again" for name in ("tuned", "release", "light")]
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == written
    # In one file now: those of the export before go, and nothing else.
    exported.write_text(exported.read_text().replace("shard = 8 KB", "shard = 1 GB"))
    tiny.run(exported)
    assert not list(out.glob("model-*"))
    assert not (out / "model.safetensors.index.json").exists()
    assert (out / "model.safetensors").exists()
    assert (out / "notes.txt").read_text() == "mine"
    # What is gone is written anew.
    (out / "model.safetensors").unlink()
    prepared, _ = tiny.plan(exported)
    states = {stage.node: stage.state for stage in prepared.plan.stages}
    assert states["release"].reason == "gone"
    assert "release done" in tiny.run(exported).lines
    assert (out / "model.safetensors").exists()


def test_export_over_a_foreign_file_is_an_error(exported: Path) -> None:
    folder = exported.parent / "elsewhere"
    folder.mkdir()
    (folder / "config.json").write_text("mine")
    exported.write_text(exported.read_text().replace('path = "out"', 'path = "elsewhere"'))
    done = tune("run", exported)
    assert done.returncode == 3
    assert "error[export-fails]" in done.stderr
    assert "this stage did not write it" in done.stderr
    assert (folder / "config.json").read_text() == "mine"


def test_export_command_writes_model_and_adapter(exported: Path) -> None:
    done = tune("export", exported, "tuned", str(exported.parent / "given"), "--dtype", "f32")
    assert done.returncode == 0, done.stderr
    names = {Path(line).name for line in done.stdout.split()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    done = tune("export", exported, "tuned", str(exported.parent / "given2"), "--apart")
    assert (exported.parent / "given2" / "adapter_config.json").exists(), done.stderr


def test_new_special_tokens_extend_the_embedding(exported: Path) -> None:
    """The exported embedding has a row more for each, the mean of the others."""
    text = exported.read_text()
    spec = exported.with_name("more.tune")
    spec.write_text(
        text[: text.index("stage tuned")].replace(
            'model small : pretrained { path = "small" }',
            'tokenizer own : huggingface { path = "small", special = ["<think>", "</think>"] }\n'
            'model small : pretrained { path = "small", tokenizer = own }',
        )
        + """
stage tuned : sft {
  from      = small
  data      = sums
  length    = 1 step
  batch     = 4 sequences
  adapter   = lora(rank = 2)
  optimizer = adamw(lr = 1e-2)
  mesh      = axes(data = 1)
}
stage release : export { from = tuned, path = "grown", dtype = f32 }
"""
    )
    assert tiny.run(spec).lines == ["tuned done", "release done"]
    before = load_file(spec.parent / "small" / "model.safetensors")["model.embed_tokens.weight"]
    after = load_file(spec.parent / "grown" / "model.safetensors")["model.embed_tokens.weight"]
    assert len(after) == len(before) + 2
    np.testing.assert_array_equal(after[: len(before)], before)
    np.testing.assert_allclose(after[-2:], np.stack([before.mean(0)] * 2), atol=1e-6)
    config = json.loads((spec.parent / "grown" / "config.json").read_text())
    assert config["vocab_size"] == len(after)
    tokenizer = Tokenizer.from_file(str(spec.parent / "grown" / "tokenizer.json"))
    assert tokenizer.token_to_id("<think>") == len(before)


# With the other libraries.

FROM_SCRATCH = """
run { seed = 3, track = [] }
data prose : text { path = "prose.txt", rows = line }
tokenizer letters : bytes { chat = chatml }
tokenizer pieces : trained { data = prose, vocabulary = 285, special = ["<think>"] }
model one : transformer {
  tokenizer = letters
  layers    = 2
  width     = 16
  heads     = 2
  context   = 32
}
model two : transformer {
  tokenizer = pieces
  layers    = 2
  width     = 16
  heads     = 2
  window    = 8
  qk_norm   = true
  tied      = false
  context   = 32
}
stage first : pretrain {
  from = one
  data = prose
  length = 2 steps
  batch = 4 sequences
  mesh = axes(data = 1)
}
stage second : pretrain {
  from = two
  data = prose
  length = 2 steps
  batch = 4 sequences
  mesh = axes(data = 1)
}
stage a : export { from = first, path = "a", dtype = f32 }
stage b : export { from = second, path = "b", dtype = f32 }
"""


def assert_logits(theirs: Any, folder: Path, logits: np.ndarray, tokens: np.ndarray) -> None:
    """Assert that `transformers` computes these logits with the model of a folder."""
    import torch

    model = theirs.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        actual = model.float()(input_ids=torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(actual, logits, atol=1e-4)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_transformers_and_peft_compute_the_same_logits(exported: Path) -> None:
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    folder = exported.parent
    tokens = np.arange(24, dtype=np.int64).reshape(2, 12)
    expected = logits_of(exported, "tuned", tokens)
    assert_logits(transformers, folder / "out", expected, tokens)
    base = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "small", attn_implementation="eager"
    )
    import torch

    adapted = peft.PeftModel.from_pretrained(base.float(), folder / "light")
    with torch.no_grad():
        actual = adapted(input_ids=torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(actual, expected, atol=1e-4)
    for name in ("out", "light"):
        theirs = transformers.AutoTokenizer.from_pretrained(folder / name)
        text = "line 3 of the prose"
        prepared, store = tiny.plan(exported)
        ours = open_generator(prepared.program, store, "tuned").model.renderer
        assert theirs(text, add_special_tokens=False).input_ids == ours.tokenizer.encode(text)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_transformers_loads_models_trained_from_scratch(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from tunelang.runtime.data.examples import Example, Message

    tiny.workspace(tmp_path)
    spec = tmp_path / "scratch.tune"
    spec.write_text(FROM_SCRATCH)
    tiny.run(spec)
    prepared, store = tiny.plan(spec)
    tokens = np.arange(40, dtype=np.int64).reshape(2, 20)
    for stage, name in (("first", "a"), ("second", "b")):
        folder = tmp_path / name
        assert_logits(transformers, folder, logits_of(spec, stage, tokens), tokens)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        ours = open_generator(prepared.program, store, stage).model.renderer
        text = " two  spaces\n\tand 👩‍👧 1234567 naïve"
        assert theirs(text, add_special_tokens=False).input_ids == ours.tokenizer.encode(text)
        assert theirs.decode(ours.tokenizer.encode(text)) == text
        messages = [Message("user", "how many?"), Message("assistant", "3")]
        expected = ours.tokens(Example("", 0, {}, messages=tuple(messages))).ids
        conversation = [{"role": turn.role, "content": turn.content} for turn in messages]
        ids = theirs.apply_chat_template(conversation, tokenize=True, return_dict=False)
        assert ids[: len(expected)] == list(expected)
        generation = json.loads((folder / "generation_config.json").read_text())
        assert generation["eos_token_id"] == list(ours.stops)


def test_architecture_of_no_family_is_an_error(tmp_path: Path) -> None:
    tiny.workspace(tmp_path)
    spec = tmp_path / "odd.tune"
    text = FROM_SCRATCH.replace("tokenizer = letters\n", "tokenizer = letters\n  norm = layer\n")
    spec.write_text(text[: text.index("stage b ")])
    done = tune("run", spec)
    assert done.returncode == 3
    assert "no family of `transformers`" in done.stderr
