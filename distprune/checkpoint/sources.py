"""From what a user calls a model to a local checkpoint folder."""

from __future__ import annotations

from pathlib import Path

from distprune.checkpoint.gguf import import_gguf
from distprune.checkpoint.hub import download, no_safetensors
from distprune.checkpoint.layout import require_checkpoint
from distprune.checkpoint.remote import fetch_model
from distprune.errors import InputError
from distprune.storage import HUB_SCHEME, is_url, location


def resolve_model(source: str, *, revision: str | None = None, cache_dir: Path | None = None) -> Path:
    """The local checkpoint folder for a folder, a .gguf file (imported once), a hub id or a URL (both downloaded).

    `revision` is a hub branch, tag or commit. `cache_dir` replaces the hub's cache and that of imported GGUF
    files. InputError: no such path or repository, or what is found is no safetensors checkpoint.
    """
    source = source.removeprefix(HUB_SCHEME)
    path = Path(source).expanduser()
    if is_url(source):
        refuse_revision(source, revision)
        folder = fetch_model(location(source))
    elif is_hub_id(source):
        folder = _resolve_hub(source, revision, cache_dir)
    else:
        folder = _resolve_local(path, revision, cache_dir)
    require_checkpoint(folder)
    return folder


def is_hub_id(source: str) -> bool:
    """Whether a model's name is that of a hub repository, being no path, nor meant for one."""
    path = Path(source).expanduser()
    is_path = path.exists() or source.startswith(("./", "../", "/", "~")) or source.count("/") > 1
    return not is_path and not _is_gguf(path)


def _is_gguf(path: Path) -> bool:
    return path.suffix.lower() == ".gguf"


def _resolve_local(path: Path, revision: str | None, cache_dir: Path | None) -> Path:
    if not path.exists():
        raise InputError(f"{path} does not exist. Give a checkpoint folder, a .gguf file or a Hugging Face hub id.")
    refuse_revision(str(path), revision)
    return import_gguf(path, cache_dir) if _is_gguf(path) and path.is_file() else path


def refuse_revision(source: str, revision: str | None) -> None:
    """Raise InputError where a revision is given for a model that is not on the hub."""
    if revision is not None:
        raise InputError(f"{source} is not on the hub, so it has no revision {revision}. Leave the revision out.")


def _resolve_hub(repository: str, revision: str | None, cache_dir: Path | None) -> Path:
    folder = download(repository, revision, cache_dir)
    if not any(folder.glob("*.safetensors")):
        raise no_safetensors(repository)
    return folder
