"""A model in an object store: each machine fetches what lies beside its weights, and of these what it reads."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from huggingface_hub.utils import filter_repo_objects
from upath import UPath

from distprune.checkpoint.disk import check_free_space
from distprune.checkpoint.side_files import LEFT_OUT, WEIGHTS
from distprune.errors import InputError
from distprune.storage import cache_folder, content_key, fetch, files_in

FETCHED_AT_ONCE = 8


def list_model(folder: UPath) -> dict[str, UPath]:
    """The model's files by their names within the folder, leaving out what is neither the model nor needed by it.

    Raises:
        InputError: there is nothing, or the store does not tell.
    """
    try:
        found = files_in(folder)
    except Exception as error:  # the clients of stores share no base class
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{folder}: can't be listed ({reason}). Check the URL and your access to it.") from error
    if not found:
        raise InputError(f"{folder}: there is nothing there. Give the URL of a Hugging Face checkpoint folder.")
    kept = filter_repo_objects(found, ignore_patterns=[*LEFT_OUT])
    return {name: found[name] for name in kept}


def fetch_model(folder: UPath, *, weights: bool = True) -> Path:
    """The model's folder in this machine's cache, with its weights or with all the rest alone.

    The cache's folder goes by what the store says of the model's files, so another model under the same URL has
    another.

    Raises:
        InputError: there is no model, or no room for it.
    """
    files = list_model(folder)
    copy = cache_folder() / "models" / fingerprint_of(files)[:32]
    if not weights:
        files = {name: files[name] for name in filter_repo_objects(files, ignore_patterns=[*WEIGHTS])}
    missing = {name: file for name, file in files.items() if not (copy / name).is_file()}
    check_free_space(copy, sum(file.stat().st_size for file in missing.values()))
    with ThreadPoolExecutor(FETCHED_AT_ONCE) as threads:
        list(threads.map(lambda name: fetch(missing[name], copy / name), missing))
    return copy


def fingerprint_of(files: Mapping[str, UPath]) -> str:
    """A sha256 in hex over the files' names and what the store says of their content, of which none is read.

    Raises:
        FileNotFoundError: one of them is not there.
    """
    with ThreadPoolExecutor(FETCHED_AT_ONCE) as threads:
        keys = threads.map(lambda name: content_key(files[name]), sorted(files))
    return hashlib.sha256(repr(sorted(zip(sorted(files), keys, strict=True))).encode()).hexdigest()
