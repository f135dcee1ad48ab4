"""Results on the Hugging Face hub, which a run makes on this machine and uploads when it is done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from distprune.checkpoint import check_destination, check_hub_ignore, check_may_write, partial_directory, upload_folder
from distprune.config import PruneConfig
from distprune.engine.run.journal import fingerprint
from distprune.engine.run.model_card import suggested_name
from distprune.engine.run.preflight import identity_of, model_identity, open_model
from distprune.engine.run.record import NOT_FOR_THE_HUB, RECORD_FILE, RunRecord, load_record
from distprune.errors import InputError, InterruptedWhenDone, StorageFailed
from distprune.hardware import AUTO
from distprune.storage import HUB_SCHEME, cache_folder, is_remote, remove_tree

Prune = Callable[[PruneConfig], RunRecord]


def goes_to_hub(config: PruneConfig) -> bool:
    """Whether a run's result is uploaded to the hub."""
    return is_on_hub(config) or config.push_to_hub is not None


def prune_to_hub(config: PruneConfig, prune: Prune) -> RunRecord:
    """Prune on this machine and upload the result; a call that could not upload it is resumed there.

    The result stays at the output, unless that is itself on the hub.

    Raises:
        InputError: the repository is taken or can't be reached or written to; nothing is done by then. Or what
            ``prune`` raises.
        StorageFailed: the upload failed; the same call repeats that alone.
        KeyboardInterrupt: a signal came; the same call goes on.
    """
    check_repository(config)
    here = made_here(config)
    try:
        record = made_before(here) or prune(here)
    except InterruptedWhenDone:
        raise KeyboardInterrupt from None  # it is not done: the result is not on the hub yet
    try:
        upload_folder(
            here.output,
            repository_of(config, record),
            overwrite=config.overwrite,
            private=config.private,
            hub_ignore=[*NOT_FOR_THE_HUB, *config.hub_ignore],
        )
    except (InputError, StorageFailed) as error:
        raise type(error)(f"{error} (The result is in {here.output}, and need not be made again.)") from error
    if is_on_hub(config):
        remove_tree(here.output)
    return record


def is_on_hub(config: PruneConfig) -> bool:
    """Whether a run's output is itself a repository on the hub."""
    return str(config.output).startswith(HUB_SCHEME)


def check_repository(config: PruneConfig) -> None:
    """See that the result could be uploaded.

    Raises:
        InputError: it could not.
    """
    check_hub_ignore(config.hub_ignore)
    if is_on_hub(config):
        if config.push_to_hub is not None:
            raise InputError(f"--push-to-hub {config.push_to_hub}: the output is on the hub already. Give one of them.")
        check_destination(str(config.output), config.overwrite)
        return
    assert config.push_to_hub is not None
    if is_remote(config.output):
        raise InputError(f"--push-to-hub {config.push_to_hub}: {config.output} must be a folder of this machine.")
    if is_namespace(config.push_to_hub):
        check_may_write(config.push_to_hub)
    else:
        check_destination(f"{HUB_SCHEME}{config.push_to_hub}", config.overwrite)


def is_namespace(repository: str) -> bool:
    return repository.endswith("/")


def repository_of(config: PruneConfig, record: RunRecord) -> str:
    """Where a run's result is uploaded to, as ``hf://NAMESPACE/NAME``."""
    if config.push_to_hub is None:
        return str(config.output)
    name = suggested_name(record) if is_namespace(config.push_to_hub) else ""
    return f"{HUB_SCHEME}{config.push_to_hub}{name}"


def made_here(config: PruneConfig) -> PruneConfig:
    """The run that makes here what is uploaded. Its configuration, which lies beside the result, uploads nothing."""
    if is_on_hub(config):
        return config.model_copy(update={"output": made_at(str(config.output)), "overwrite": True, "hub_ignore": []})
    return config.model_copy(update={"push_to_hub": None, "hub_ignore": []})


def made_at(repository: str) -> Path:
    """Where this machine makes what is uploaded to a repository."""
    return cache_folder() / "outputs" / repository.removeprefix(HUB_SCHEME).replace("/", "--")


def made_before(config: PruneConfig) -> RunRecord | None:
    """The record of an earlier run whose result lies at the output, if a run of this configuration makes the same."""
    if config.restart or not (config.output / RECORD_FILE).is_file() or partial_directory(config.output).exists():
        return None
    record = load_record(config.output)
    settled = config.model_copy(update={"dtype": record.dtype}) if config.dtype == AUTO else config
    identity = identity_of(settled, model_identity(*open_model(config)), record.device)
    return record if fingerprint(identity) == record.fingerprint else None
