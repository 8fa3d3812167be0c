"""Finds folders of published models: local ones, in the hub's cache, or fetched into it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

CONFIG = "config.json"
DESCRIBING = ("*.json", "*.jinja", "*.model", "*.txt")
"""Patterns of the files that describe a model and its tokenizer, without weights."""
EVERYTHING = (*DESCRIBING, "*.safetensors")

_ID = re.compile(r"[\w.-]+/[\w.-]+")


class NoModelError(Exception):
    """No folder exists for a model: its `path`, `why` not, and a `fix`."""

    def __init__(self, path: str, why: str, fix: str) -> None:
        super().__init__(path, why, fix)
        self.path, self.why, self.fix = path, why, fix


def folder_of(
    path: str, base: Path, revision: str | None = None, patterns: tuple[str, ...] = EVERYTHING
) -> Path:
    """Return the folder for a path relative to `base`, or for an id on the hub.

    From the hub, files that match the `patterns` are fetched unless they are in the cache. Raises
    `NoModelError`.
    """
    local = base / Path(path).expanduser()
    if local.is_dir():
        return local
    if not _ID.fullmatch(path):
        raise NoModelError(path, "there is no such folder", "a folder, or an id such as `org/name`")
    names = list(patterns)
    try:
        snapshot = Path(
            snapshot_download(path, revision=revision, allow_patterns=names, local_files_only=True)
        )
        # A snapshot with the configuration alone was fetched by a plan.
        if patterns is DESCRIBING or any(snapshot.glob("*.safetensors")):
            return snapshot
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        pass
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=names))
    except GatedRepoError:
        fix = "accept its terms on the hub, then `hf auth login`"
        raise NoModelError(path, "the hub gives it to those who accepted its terms", fix) from None
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):
        named = path if revision is None else f"{path} at {revision}"
        fix = "check the name; for a private one, `hf auth login`"
        raise NoModelError(path, f"the hub has no `{named}`", fix) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError):
        raise NoModelError(
            path,
            "it is not in the hub's cache, and the hub cannot be reached",
            f"`hf download {path}` where there is a network, or the path of a folder",
        ) from None


def cached_config(path: str, base: Path, revision: str | None = None) -> Path | None:
    """Return the folder of a model's configuration if it is on this machine; fetches nothing."""
    local = base / Path(path).expanduser()
    if local.is_dir():
        return local
    if not _ID.fullmatch(path):
        return None
    config = try_to_load_from_cache(path, CONFIG, revision=revision)
    return Path(config).parent if isinstance(config, str | os.PathLike) else None
