"""Measure time and memory of reading a checkpoint: `python benchmarks/weights.py [GIB]`.

Writes a random Llama of that size, float32, then reads it in a process of its own. Memory is the
highest resident set (VmHWM) less that after the imports: on a CPU, the parameters themselves are
in it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
from safetensors.numpy import save_file

from tunelang.compiler.models.families import architecture_of
from tunelang.compiler.models.parameter_counts import parameter_count
from tunelang.runtime.loading import pretrained
from tunelang.runtime.models.model_folder import read_config
from tunelang.runtime.sharding import make_layout

MIB = 2**20
LAYER = 12.6e6
"""Parameters of a layer, roughly."""


def config(gib: float) -> dict[str, Any]:
    """Return the configuration of a float32 Llama of about this many GiB."""
    layers = max(1, round((gib * 2**30 / 4 - 2 * 32_000 * 1024) / LAYER))
    return {
        "model_type": "llama", "vocab_size": 32_000, "hidden_size": 1024,
        "intermediate_size": 2816, "num_hidden_layers": layers, "num_attention_heads": 16,
        "num_key_value_heads": 16, "max_position_embeddings": 2048, "tie_word_embeddings": False,
    }  # fmt: skip


def write(folder: Path, stated: dict[str, Any]) -> None:
    """Write random weights, a file for each layer as large models have them."""
    width, mlp = stated["hidden_size"], stated["intermediate_size"]
    rng = np.random.default_rng(0)
    index: dict[str, str] = {}

    def save(file: str, shapes: dict[str, tuple[int, ...]]) -> None:
        drawn = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
        save_file(drawn, folder / file)
        index.update(dict.fromkeys(shapes, file))

    tables = {"model.embed_tokens.weight": (stated["vocab_size"], width)}
    save("tables.safetensors", {**tables, "model.norm.weight": (width,)})
    save("head.safetensors", {"lm_head.weight": (stated["vocab_size"], width)})
    for layer in range(stated["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        square = {f"{at}self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        norms = {f"{at}{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
        wide = {f"{at}mlp.{name}_proj.weight": (mlp, width) for name in ("gate", "up")}
        down = {f"{at}mlp.down_proj.weight": (width, mlp)}
        save(f"layer-{layer}.safetensors", {**square, **norms, **wide, **down})
    (folder / "config.json").write_text(json.dumps(stated))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def resident(what: str) -> float:
    """Return a field of `/proc/self/status` (`VmRSS`, `VmHWM`) in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what + ":"):
            return int(line.split()[1]) / 1024
    raise LookupError(what)


def read(folder: Path) -> None:
    """Read the checkpoint; print the time and the memory that it took."""
    architecture = architecture_of(read_config(folder))
    layout = make_layout()
    before, start = resident("VmRSS"), time.perf_counter()
    params = pretrained.load(folder, architecture, layout)
    took = time.perf_counter() - start
    size = parameter_count(architecture) * 4 / MIB
    largest = 32_000 * 1024 * 4 / MIB
    extra = resident("VmHWM") - before - size
    print(f"model {size:,.0f} MiB, largest tensor {largest:,.0f} MiB, read in {took:.1f} s")
    print(f"beyond the model at most {extra:,.0f} MiB: {max(0, extra - largest) / size:.1%} of it")
    print("beyond the largest tensor")
    del params


def main() -> None:
    """Write a checkpoint, and read it in another process."""
    gib = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), config(gib))
        subprocess.run([sys.executable, __file__, "--read", name], check=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--read"]:
        read(Path(sys.argv[2]))
    else:
        main()
