"""Where files lie: on this machine's file systems, or in an object store (s3://, gs:// and whatever else fsspec opens).

A location is a :class:`pathlib.Path`, or for an object store a :class:`upath.UPath`, which has the same methods. What
differs is here and in :mod:`distprune.checkpoint.durable`: an object appears whole when it is written, and has no name
but its own, so nothing is ever renamed into place there.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import PlainSerializer, PlainValidator
from upath import UPath

from distprune.errors import InputError

CACHE_VARIABLE = "DISTPRUNE_CACHE"
SCHEME = "://"
#: What may stand before a hub id.
HUB_SCHEME = "hf://"
# What to install for a store whose client is missing.
CLIENTS = {"s3": "distprune[s3]", "s3a": "distprune[s3]", "gs": "distprune[gs]", "gcs": "distprune[gs]", "az": "adlfs"}
# What stores say of an object that changes whenever its content does, the best first.
CONTENT_KEYS = ("ETag", "etag", "md5Hash", "checksum", "LastModified", "mtime", "created")


def location(place: str | os.PathLike | UPath) -> Path | UPath:
    """The location that a path or URL names.

    Raises:
        InputError: the URL's store is unknown, or the package that opens it is not installed.
    """
    if isinstance(place, UPath):
        return place
    text = os.fspath(place)
    if SCHEME not in text:
        return Path(text)
    scheme, _, rest = text.partition(SCHEME)
    if scheme in ("file", "local"):
        return Path(rest)
    try:
        # Another machine may write there, so nothing that was listed once is believed later.
        found = UPath(text, use_listings_cache=False)
        _ = found.fs
    except ImportError as error:
        package = CLIENTS.get(scheme, "the package named in the message")
        raise InputError(f"{text}: {error}. Install it: pip install {package!r}.") from None
    except ValueError as error:
        raise InputError(f"{text}: {error}. Give a path, or a URL such as s3://bucket/folder.") from None
    return found


def is_remote(place: Path | UPath) -> bool:
    """Whether a location is in an object store."""
    return not isinstance(place, Path)


def is_url(text: str | os.PathLike | UPath) -> bool:
    """Whether a path or URL names a place in an object store."""
    return isinstance(text, UPath) or (SCHEME in os.fspath(text) and not os.fspath(text).startswith("file://"))


def local_folder(place: str | os.PathLike, option: str) -> Path:
    """The folder of this machine that an option names.

    Raises:
        InputError: it is a URL.
    """
    if is_url(place):
        raise InputError(f"--{option} {place}: must be a folder of this machine. Give a path.")
    return Path(place)


def as_text(place: Path | UPath) -> str:
    """The path or URL that names a location."""
    return str(place)


#: A field of a pydantic model that holds a location, and is text in JSON.
Location: TypeAlias = Annotated[Any, PlainValidator(location), PlainSerializer(as_text, return_type=str)]


def cache_folder() -> Path:
    """Where this machine keeps what it has fetched or converted: DISTPRUNE_CACHE, or ~/.cache/distprune."""
    return Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/distprune").expanduser()


def content_key(file: UPath) -> str:
    """What changes whenever the object's content does, as its store tells without reading it.

    Raises:
        FileNotFoundError: there is no such object.
    """
    told = file.fs.info(file.path)
    key = next((str(told[name]) for name in CONTENT_KEYS if told.get(name)), "")
    return hashlib.sha256(f"{told.get('size')} {key}".encode()).hexdigest()


def local_copy(file: Path | UPath) -> Path:
    """The file itself, or a copy of an object in this machine's cache, under its own name.

    Raises:
        FileNotFoundError: there is no such object.
    """
    if not is_remote(file):
        return file
    copy = cache_folder() / "objects" / content_key(file) / file.name
    if not copy.is_file():
        fetch(file, copy)
    return copy


def fetch(file: UPath, target: Path) -> None:
    """Copy an object to a local file, which appears whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    os.close(handle)
    try:
        file.fs.get_file(file.path, temporary)
        os.replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)


def upload(file: Path, target: UPath) -> None:
    """Copy a local file to an object, which appears whole or not at all."""
    # For file systems that are no object stores, such as SFTP.
    target.fs.makedirs(target.path.rpartition("/")[0], exist_ok=True)
    target.fs.put_file(str(file), target.path)


def copy(source: Path | UPath, target: Path | UPath) -> None:
    """Copy a file from anywhere to anywhere."""
    if is_remote(source) or is_remote(target):
        target.write_bytes(source.read_bytes())
    else:
        shutil.copyfile(source, target)


@contextmanager
def kept_locally(file: Path | UPath) -> Iterator[Path]:
    """Yield a local file to change: the file itself, or a copy of an object, which becomes the object at the end."""
    if not is_remote(file):
        yield file
        return
    with tempfile.TemporaryDirectory(prefix="distprune-") as folder:
        local = Path(folder) / file.name
        if file.is_file():
            fetch(file, local)
        try:
            yield local
        finally:
            if local.exists():
                upload(local, file)


@contextmanager
def staged(folder: Path | UPath) -> Iterator[Path]:
    """Yield a local folder to write files to: the folder itself, or one whose files are copied there at the end."""
    if not is_remote(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="distprune-staged-") as temporary:
        yield Path(temporary)
        for file in sorted(path for path in Path(temporary).rglob("*") if path.is_file()):
            upload(file, folder / file.relative_to(temporary).as_posix())


def make_folder(folder: Path | UPath) -> None:
    """Make a folder, and those that it is in; object stores have none."""
    if not is_remote(folder):
        folder.mkdir(parents=True, exist_ok=True)


def remove_tree(folder: Path | UPath, last: Path | UPath | None = None) -> None:
    """Remove a folder and all that is in it, if it is there; a file that is to go ``last`` after all others."""
    files = objects_in(folder) if is_remote(folder) else folder.rglob("*")
    for path in files:
        if path != last and not path.is_dir():
            path.unlink(missing_ok=True)
    if last is not None:
        last.unlink(missing_ok=True)
    if not is_remote(folder):
        shutil.rmtree(folder, ignore_errors=True)
    elif folder.fs.isdir(folder.path):  # file systems that are no object stores keep the folders
        folder.fs.rm(folder.path, recursive=True)


def objects_in(folder: UPath) -> list[UPath]:
    """All objects below a location, sorted; none where there is nothing."""
    # A store that takes the path for a prefix would give FOLDER.partial too.
    found = [path for path in folder.fs.find(folder.path) if path.startswith(f"{folder.path.rstrip('/')}/")]
    return [location(folder.fs.unstrip_protocol(path)) for path in sorted(found)]


def files_in(folder: UPath) -> dict[str, UPath]:
    """The same by their paths relative to the location."""
    return {file.path.removeprefix(folder.path.rstrip("/")).lstrip("/"): file for file in objects_in(folder)}
