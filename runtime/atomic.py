"""Files that are either whole or not there, with several processes writing the same one."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a file to write in place of `path`, which it becomes at the end, unless writing failed.

    Its name is random, since hosts that share a folder may well share process ids. It keeps the
    suffix, which `numpy.save` insists on.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(8)}.{path.name}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
