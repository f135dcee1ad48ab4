"""What files and datasets are known by: their content, wherever they lie."""

from __future__ import annotations

import hashlib
from pathlib import Path

from huggingface_hub import HfApi

from distprune.calibration.text_sources import fetched, refuse_missing_file
from distprune.errors import InputError
from distprune.storage import is_url

PIECE = 2**20  # bytes


def digest_of_text(source: str) -> str:
    """The SHA-256 of a text file, or the commit that a dataset on the hub is at.

    Raises:
        InputError: there is neither such a file nor such a dataset.
    """
    if is_url(source):
        return digest_of_file(fetched(source))
    path = Path(source).expanduser()
    if path.exists():
        return digest_of_file(path)
    refuse_missing_file(source)
    name = source.partition(":")[0]
    try:
        return f"{name}@{HfApi().dataset_info(name).sha}"
    except Exception as error:  # the hub's client and its transport share no base class
        raise InputError(
            f"{source}: no such file, and no Hugging Face dataset of that name was found. Check the name and the "
            "network."
        ) from error


def digest_of_file(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes.

    Raises:
        InputError: it can't be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(PIECE):
                digest.update(piece)
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror}). Check the path.") from None
    return digest.hexdigest()


def digest_of_folder(folder: Path) -> str:
    """SHA-256 (hex) of the names and contents of all files below a folder.

    Raises:
        InputError: there is no such folder.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder. Check the path.")
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{file.relative_to(folder).as_posix()}\n{digest_of_file(file)}\n".encode())
    return digest.hexdigest()
