"""Digests of what a spec names on disk: data files, Python files, model and tokenizer folders.

A digest covers content, never names or times of the outer path: a data file that was moved is the
same data. Files are read as streams; digests are cached by path, size and time of change.

A model folder is digested without reading all of its weights, which may be hundreds of GB:

- every small file that decides what the model is (`.json`, `.model`, `.txt`, `.jinja`): its name
  and whole content;
- every `.safetensors` file: its name, size, header (names, shapes, types and places of all tensors)
  and `SAMPLES` pieces of `SAMPLE_BYTES` each, evenly spread from the first byte to the last.

Training changes nearly every weight, and so every sample. A change of a few bytes by hand between
two samples that leaves the size alone is not seen.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from typing_extensions import override

from tunelang.dsl.diagnostics.tune_error import FailureText, TuneError
from tunelang.dsl.messages import run_failures

DIGEST_LENGTH = 32
"""Hexadecimal digits of a digest: 128 bits of SHA-256."""
SAMPLES = 64
SAMPLE_BYTES = 64 * 1024
_HEADER_LIMIT = 100 * 2**20
"""Largest header of a safetensors file, as its own library has it."""
_RACY_SECONDS = 2.0
_DESCRIBING = (".json", ".model", ".txt", ".jinja")
_TOKENIZER_NAMES = ("tokenizer", "special_tokens", "added_tokens", "chat_template", "vocab")
_FORMAT = 1


@dataclass(eq=False)
class ContentError(TuneError):
    """A file or folder that the spec names cannot be read."""

    code = "store-fails"
    path: Path
    reason: str

    @override
    def text(self, stage: str) -> FailureText:
        return run_failures.unreadable(self.path, self.reason)


def digest(*parts: bytes) -> str:
    """Return the digest of a sequence of byte strings and their lengths."""
    hasher = hashlib.sha256()
    for part in parts:
        hasher.update(len(part).to_bytes(8, "little"))
        hasher.update(part)
    return hasher.hexdigest()[:DIGEST_LENGTH]


@dataclass
class Contents:
    """Digests of files, with a cache in a small JSON file that `save` writes."""

    cache: Path | None = None
    """Where digests are kept between processes; none: only in memory."""
    known: dict[str, tuple[int, int, str]] = field(default_factory=dict)
    """Absolute path, behind it the way of reading -> size, time of change (ns), digest."""
    changed: bool = False

    @classmethod
    def load(cls, cache: Path | None) -> Contents:
        """Load the cache file; a missing or damaged one is empty."""
        contents = cls(cache)
        try:
            document = json.loads(cache.read_text("utf-8")) if cache is not None else {}
            if document.get("format") == _FORMAT:
                contents.known = {
                    str(path): (int(size), int(modified), str(file_digest))
                    for path, (size, modified, file_digest) in document["files"].items()
                }
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            contents.known = {}
        return contents

    def save(self) -> None:
        """Write the cache file atomically. If it cannot be written, the next process computes the
        digests again.
        """
        if self.cache is None or not self.changed:
            return
        document = {"format": _FORMAT, "files": dict(sorted(self.known.items()))}
        temporary = self.cache.with_name(f".{self.cache.name}.{os.getpid()}.part")
        try:
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(document, indent=0), "utf-8")
            temporary.replace(self.cache)
            self.changed = False
        except OSError:
            with suppress(OSError):
                temporary.unlink()

    def file(self, path: Path) -> str:
        """Return the digest of a file's content. Raises `ContentError`."""
        return self._cached(path, "", _whole)

    def model(self, folder: Path) -> str:
        """Return the digest of a model folder, as the module docstring says. Raises
        `ContentError`.
        """
        return self._folder(folder, lambda name: name.endswith((*_DESCRIBING, ".safetensors")))

    def tokenizer(self, folder: Path) -> str:
        """Return the digest of the tokenizer in a model folder. Raises `ContentError`."""
        return self._folder(
            folder,
            lambda name: (
                (name.startswith(_TOKENIZER_NAMES) and name.endswith(_DESCRIBING))
                or name.endswith(".model")
                or name == "merges.txt"
            ),
        )

    def _folder(self, folder: Path, wanted: Callable[[str], bool]) -> str:
        try:
            paths = sorted(path for path in folder.iterdir() if path.is_file())
        except OSError as error:
            raise ContentError(folder, _reason(error)) from None
        lines: Iterable[tuple[str, str]] = (
            (path.name, self._weights(path) if path.suffix == ".safetensors" else self.file(path))
            for path in paths
            if wanted(path.name)
        )
        return digest(*(f"{name} {content}".encode() for name, content in lines))

    def _weights(self, path: Path) -> str:
        return self._cached(path, "sampled", _sampled)

    def _cached(self, path: Path, way: str, read: Callable[[Path], str]) -> str:
        key = f"{os.path.abspath(path)}{chr(9) + way if way else ''}"
        try:
            before = path.stat()
            known = self.known.get(key)
            if known is not None and known[:2] == (before.st_size, before.st_mtime_ns):
                return known[2]
            file_digest = read(path)
            after = path.stat()
        except OSError as error:
            raise ContentError(path, _reason(error)) from None
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise ContentError(path, "it changed while it was read")
        # A file changed just now may change again within the resolution of its time stamp.
        if time.time() - after.st_mtime > _RACY_SECONDS:
            self.known[key] = (after.st_size, after.st_mtime_ns, file_digest)
            self.changed = True
        return file_digest


def _whole(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:DIGEST_LENGTH]


def _sampled(path: Path) -> str:
    """Return the size, header and samples of a safetensors file; all of a file without a header."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _HEADER_LIMIT):
            return _whole(path)
        parts = [size.to_bytes(8, "little"), file.read(length)]
        start, room = 8 + length, size - 8 - length
        if room <= SAMPLES * SAMPLE_BYTES:
            return digest(*parts, file.read())
        for at in range(SAMPLES):
            file.seek(start + (room - SAMPLE_BYTES) * at // (SAMPLES - 1))
            parts.append(file.read(SAMPLE_BYTES))
    return digest(*parts)


def _reason(error: OSError) -> str:
    return (error.strerror or "it cannot be read").lower()
