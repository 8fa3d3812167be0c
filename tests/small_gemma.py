"""Write a small random Gemma to a folder, with a tokenizer fitted to a text: `FOLDER [TEXT]`.

It has the form of a published checkpoint. Other tests start from it, and
`specs/gemma_three_sessions.tune` can be run with it (see its test).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flax import nnx
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tunelang.compiler.models.families import architecture_of
from tunelang.runtime.loading.stored_tensors import tensors
from tunelang.runtime.models.decoder import Decoder
from tunelang.runtime.tokenize.chat_templates import NAMED

SIZES: dict[str, Any] = {
    "model_type": "gemma", "architectures": ["GemmaForCausalLM"], "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 2048,
    "hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6,
}  # fmt: skip
SPECIAL = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]


def write(folder: Path, texts: Iterable[str], vocabulary: int = 512, **sizes: Any) -> None:
    """Write the files; `sizes` are attributes of `config.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    settings = {**names, "chat_template": NAMED["gemma"].source}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = {**SIZES, "vocab_size": tokenizer.get_vocab_size(), **sizes}
    config |= {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    _, params = nnx.split(Decoder(architecture_of(config), nnx.Rngs(0)))
    save_file(dict(tensors(params, config)), folder / "model.safetensors")


if __name__ == "__main__":
    source = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__)
    write(Path(sys.argv[1]), source.read_text("utf-8").splitlines())
