"""Putting a finished checkpoint where its users open it: a folder, an object store, or the Hugging Face hub.

Whoever opens the destination finds the old checkpoint, the new one or none, and never a part of one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects, validate_repo_id

from distprune.checkpoint.disk import check_free_space
from distprune.checkpoint.hub_access import check_may_write
from distprune.checkpoint.layout import CONFIG_FILE
from distprune.checkpoint.publish import hold_lock, prepare_output, publish
from distprune.checkpoint.side_files import MODEL_CARD
from distprune.errors import InputError, RunFailed, StorageFailed
from distprune.storage import files_in, location, upload

# Lies in an object store beside a checkpoint of which not all files are there yet.
UNFINISHED = "distprune_upload_unfinished"
HUB = "hf"
# Stores whose URLs begin with a bucket.
WITH_BUCKETS = ("s3", "s3a", "gs", "gcs")
# What goes of an older checkpoint on the hub before a newer one comes; a licence stays.
STALE_ON_HUB = ["*.safetensors", "*.safetensors.index.json", "modeling_*.py", "configuration_*.py", CONFIG_FILE]
# Without these nothing opens: one or several files of weights, and the configuration.
INDISPENSABLE = (CONFIG_FILE, "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json")
# In the metadata of a model card that distprune wrote.
OWN_TAG = "\n- distprune\n"


def upload_folder(
    folder: Path, destination: str, *, overwrite: bool = False, private: bool = True, hub_ignore: Sequence[str] = ()
) -> None:
    """Copy a checkpoint folder to a destination.

    Args:
        folder: the checkpoint.
        destination: a local folder, ``hf://ORGANIZATION/NAME``, or the URL of a folder that fsspec knows how to reach,
            such as ``s3://BUCKET/FOLDER``.
        overwrite: replace a checkpoint that is there.
        private: a repository on the hub that has to be made is private.
        hub_ignore: patterns of files that the hub does not get, as huggingface_hub's ``ignore_patterns``.

    Raises:
        InputError: the destination is no such thing, or is taken.
        StorageFailed: it could not be reached; what was there may be gone, but no part of a checkpoint opens.
    """
    check_destination(destination, overwrite)
    with reaching(destination, StorageFailed):
        match scheme_of(destination):
            case "file":
                to_folder(folder, local_path(destination), overwrite)
            case "hf":
                to_hub(folder, destination, private, hub_ignore)
            case _:
                to_storage(folder, destination)


def check_destination(destination: str, overwrite: bool = False) -> None:
    """See that a checkpoint can be put there, as far as can be told without doing so.

    Raises:
        InputError: the destination is malformed, taken or out of reach, or a package or a token for it is missing.
    """
    scheme = scheme_of(destination)
    if scheme == "file":
        prepare_output(local_path(destination), overwrite)
        return
    if scheme == HUB:
        check_name(destination)
    else:
        location(destination)
    with reaching(destination, InputError):
        if scheme == HUB:
            check_may_write(repository_of(destination))
        if scheme in WITH_BUCKETS:
            check_bucket(destination)
        names = names_at(destination)
        if names and UNFINISHED not in names:
            check_taken(destination, names, overwrite)


def read_published(destination: str, name: str) -> bytes | None:
    """A file of the checkpoint at a destination; None where there is no such file, or no whole checkpoint.

    Raises:
        InputError: the destination can't be reached.
    """
    scheme = scheme_of(destination)
    with reaching(destination, InputError):
        if scheme == "file":
            file = local_path(destination) / name
            return file.read_bytes() if file.is_file() and (file.parent / CONFIG_FILE).is_file() else None
        names = names_at(destination)
        if not {CONFIG_FILE, name} <= names or UNFINISHED in names:
            return None
        if scheme == HUB:
            return Path(HfApi().hf_hub_download(repository_of(destination), name)).read_bytes()
        return (location(destination) / name).read_bytes()


def check_hub_ignore(patterns: Sequence[str], needed: Sequence[str] = INDISPENSABLE) -> None:
    """See that patterns keep no file out of an upload that is needed there.

    Raises:
        InputError: one does.
    """
    for pattern in patterns:
        kept = set(filter_repo_objects(needed, ignore_patterns=[pattern]))
        for name in needed:
            if name not in kept:
                raise InputError(
                    f"hub_ignore: '{pattern}' would keep {name} out of the upload, which is needed there. Give a "
                    "narrower pattern."
                )


# ------------------------------------------------------------------ where it goes


def scheme_of(destination: str) -> str:
    """What stands before ``://``; "file" of a local path."""
    return destination.partition("://")[0] if "://" in destination else "file"


def local_path(destination: str) -> Path:
    path = unquote(urlsplit(destination).path) if destination.startswith("file://") else destination
    return Path(os.path.abspath(Path(path).expanduser()))


def repository_of(destination: str) -> str:
    return destination.removeprefix(f"{HUB}://").rstrip("/")


def names_at(destination: str) -> set[str]:
    """The files at a destination outside this machine, as paths relative to it."""
    if scheme_of(destination) == HUB:
        try:
            return set(HfApi().list_repo_files(repository_of(destination))) - {".gitattributes"}
        except RepositoryNotFoundError:
            return set()
    return set(files_in(location(destination)))


def check_name(destination: str) -> None:
    try:
        validate_repo_id(repository_of(destination))
    except ValueError as error:
        raise InputError(f"{destination}: is no repository ({error}). Write hf://ORGANIZATION/NAME.") from None


def check_bucket(destination: str) -> None:
    place = location(destination)
    bucket = place.path.partition("/")[0]
    if not place.fs.exists(bucket):
        raise InputError(f"{destination}: there is no bucket '{bucket}' that these credentials may see. Make it first.")


def check_taken(destination: str, names: set[str], overwrite: bool) -> None:
    if scheme_of(destination) == HUB and CONFIG_FILE not in names:
        return  # a repository that was made beforehand, with a model card perhaps, of which nothing is replaced
    if not overwrite:
        raise InputError(
            f"{destination} exists. Choose another destination, or allow overwriting it with --overwrite (in YAML, "
            "overwrite: true)."
        )
    if CONFIG_FILE not in names:
        raise InputError(
            f"{destination} is not overwritten: it holds files but no config.json, so it is not a checkpoint. "
            "Choose another destination, or remove them yourself."
        )


@contextmanager
def reaching(destination: str, failure: type[Exception]) -> Iterator[None]:
    """What goes wrong inside, on the way to the destination or there, is that kind of failure."""
    try:
        yield
    except (InputError, RunFailed, EntryNotFoundError):
        raise
    except Exception as error:  # every store's client has exceptions of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise failure(
            f"{destination} can't be reached. Check the name, the network and the credentials, and give the same "
            f"command again. What was said: {reason}"
        ) from error


# ------------------------------------------------------------------ the three ways


def files_of(folder: Path) -> dict[str, Path]:
    """A checkpoint's files by path relative to it, config.json last: without it nothing opens a folder."""
    found = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    return found | {CONFIG_FILE: found.pop(CONFIG_FILE)}


def to_folder(folder: Path, output: Path, overwrite: bool) -> None:
    """Copied beside the output, and made visible by one rename."""
    beside = output.with_name(f"{output.name}.publishing")
    with hold_lock(beside):
        shutil.rmtree(beside, ignore_errors=True)  # of an earlier attempt
        check_free_space(output, sum(file.stat().st_size for file in files_of(folder).values()))
        try:
            shutil.copytree(folder, beside)
            publish(beside, output, overwrite)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def to_storage(folder: Path, destination: str) -> None:
    """An object store knows no rename, so config.json comes last; of an older checkpoint it goes first."""
    place, files = location(destination), files_of(folder)
    old = files_in(place)
    (place / UNFINISHED).write_text("This checkpoint is being uploaded.\n")
    (place / CONFIG_FILE).unlink(missing_ok=True)
    for name in old.keys() - files.keys() - {UNFINISHED}:
        old[name].unlink()
    for name, file in files.items():
        upload(file, place / name)
    (place / UNFINISHED).unlink()


def to_hub(folder: Path, destination: str, private: bool, ignore: Sequence[str]) -> None:
    """The hub's client makes one commit or, of a large folder, several, and skips what an earlier attempt has brought.

    So config.json has a commit of its own, the last; of an older checkpoint it goes in the first. A model card that
    someone else wrote stays.
    """
    hub, repository = HfApi(), repository_of(destination)
    hub.create_repo(repository, private=private, exist_ok=True)
    message = f"Upload {folder.name} with distprune"
    hub.upload_folder(
        repo_id=repository,
        folder_path=folder,
        ignore_patterns=[CONFIG_FILE, *ignore, *([MODEL_CARD] if has_card_of_its_own(destination) else [])],
        delete_patterns=STALE_ON_HUB,
        commit_message=message,
    )
    hub.upload_file(
        path_or_fileobj=folder / CONFIG_FILE, path_in_repo=CONFIG_FILE, repo_id=repository, commit_message=message
    )


def has_card_of_its_own(destination: str) -> bool:
    """Whether a repository on the hub has a model card that distprune did not write."""
    if MODEL_CARD not in names_at(destination):
        return False
    card = Path(HfApi().hf_hub_download(repository_of(destination), MODEL_CARD))
    return OWN_TAG not in card.read_text(encoding="utf-8", errors="replace")
