"""Outputs on the Hugging Face hub, which a run makes on this machine and uploads in one commit when it is done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from distprune.checkpoint import check_destination, upload_folder
from distprune.config import PruneConfig, load_config
from distprune.engine.run.record import CONFIG_FILE, RunRecord, load_record
from distprune.hardware import AUTO
from distprune.storage import HUB_SCHEME, cache_folder, remove_tree


def is_on_hub(config: PruneConfig) -> bool:
    """Whether a run's output is a repository on the hub."""
    return str(config.output).startswith(HUB_SCHEME)


def prune_to_hub(config: PruneConfig, prune: Callable[[PruneConfig], RunRecord]) -> RunRecord:
    """Prune into this machine's cache and upload the result; a call that could not upload it is resumed there.

    Raises:
        InputError: the repository is taken or can't be reached; nothing is done by then. Or what ``prune`` raises.
        StorageFailed: the upload failed; the same call repeats that alone.
    """
    repository = str(config.output)
    check_destination(repository, config.overwrite)
    here = config.model_copy(update={"output": made_at(repository), "overwrite": False})
    if is_made(here):
        record = load_record(here.output)
    else:
        remove_tree(here.output)
        record = prune(here)
    upload_folder(here.output, repository, overwrite=config.overwrite)
    remove_tree(here.output)
    return record


def made_at(repository: str) -> Path:
    """Where this machine makes what is uploaded to a repository."""
    return cache_folder() / "outputs" / repository.removeprefix(HUB_SCHEME).replace("/", "--")


def is_made(config: PruneConfig) -> bool:
    """Whether an earlier call has made the output with the same configuration, except for a dtype that is "auto"."""
    file = config.output / CONFIG_FILE
    if config.restart or not file.is_file():
        return False
    made = load_config(file, {})
    settled = config.model_copy(update={"dtype": made.dtype}) if config.dtype == AUTO else config
    return (made.model, made.revision, made.decisive()) == (config.model, config.revision, settled.decisive())
