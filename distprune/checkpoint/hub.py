"""A model on the Hugging Face hub, of which each machine fetches no more than the files it reads."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from huggingface_hub import (
    constants,
    file_exists,
    hf_hub_download,
    parse_safetensors_file_metadata,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import EntryNotFoundError
from torch import Tensor

from distprune.checkpoint.disk import GB, check_free_space, free_bytes
from distprune.checkpoint.headers import read_header
from distprune.checkpoint.infos import TensorInfo, describe
from distprune.checkpoint.layout import (
    CONFIG_FILE,
    INDEX_FILE,
    find_entry,
    is_index,
    read_weight_map,
    refuse_adapter,
    refuse_lone_adapter,
)
from distprune.checkpoint.quantization import notes_on
from distprune.checkpoint.reader import Checkpoint, read_config, tensors_of
from distprune.checkpoint.side_files import LEFT_OUT, WEIGHTS
from distprune.checkpoint.tensors import TensorFiles, map_tensor
from distprune.errors import InputError, Unreachable

# Python files are fetched, never run: only trust_remote_code does that.
EXTRAS = ["*/*.safetensors", "consolidated*"]  # other models' folders, and Mistral's second copy of the weights
HEADERS_AT_ONCE = 8
RESERVE = GB  # of the disk that fetched files never take


@dataclass(frozen=True)
class HubModel:
    """A commit of a repository; ``folder`` is its snapshot in the cache of the machine that found it."""

    repository: str
    commit: str
    folder: Path

    def fetch_all(self) -> Path:
        """The whole snapshot, in this machine's cache."""
        return download(self.repository, self.commit)

    def fetch(self, name: str) -> Path:
        with asked_for(f"{name} of {self.repository}"):
            return Path(hf_hub_download(self.repository, name, revision=self.commit))

    def cached(self, name: str) -> Path | None:
        """A file that is in this machine's cache already."""
        found = try_to_load_from_cache(self.repository, name, revision=self.commit)
        return Path(found) if isinstance(found, str) else None


def find_on_hub(repository: str, revision: str | None = None) -> HubModel:
    """Settle on a commit, and fetch its configuration, tokenizer and index.

    Raises:
        InputError: there is no such repository or revision, or neither hub nor cache gives it.
    """
    folder = download(repository, revision, weights=False)
    return HubModel(repository, folder.name, folder)


def open_on_hub(model: HubModel, trust_remote_code: bool = False) -> Checkpoint:
    """The checkpoint whose files' headers alone were read; reading a tensor fetches the file that holds it.

    Raises:
        InputError: it has no safetensors weights, or its headers can't be had; else as `Checkpoint.open` does.
    """
    if not (model.folder / CONFIG_FILE).is_file():
        refuse_lone_adapter(model.folder)
    refuse_adapter(model.folder)
    config, scheme = read_config(model.folder, trust_remote_code)
    entry = find_entry(model.folder, partial(_is_there, model))
    names = sorted(set(read_weight_map(entry).values())) if is_index(entry) else [entry.name]
    with ThreadPoolExecutor(HEADERS_AT_ONCE) as threads:
        headers = dict(zip(names, threads.map(lambda name: _header(model, name), names), strict=True))
    tensors = tensors_of(entry, headers, scheme)
    return Checkpoint(model.folder, config, tensors, HubFiles(model, tensors), notes_on(scheme))


def download(
    repository: str, revision: str | None = None, cache_dir: Path | None = None, *, weights: bool = True
) -> Path:
    """The snapshot folder of a repository, with its weights or with all the rest of a checkpoint alone."""
    # Without a revision it may have been meant for a path.
    what = f"{repository} at revision {revision}" if revision else f"{repository} is no file or folder here, and"
    ignored = [*LEFT_OUT, *EXTRAS, *([] if weights else WEIGHTS)]
    with asked_for(what):
        folder = snapshot_download(repository, revision=revision, cache_dir=cache_dir, ignore_patterns=ignored)
    return Path(folder)


@contextmanager
def asked_for(what: str) -> Iterator[None]:
    """What goes wrong inside, with the hub's client or on the way to the hub, is bad input."""
    try:
        yield
    except Exception as error:  # the hub's client and its transport share no base class
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{what} could not be fetched from the Hugging Face hub. Check the name and the network, and for a gated "
            f"model log in with `hf auth login`. The hub's client says: {reason}"
        ) from error


def no_safetensors(repository: str) -> InputError:
    return InputError(
        f"{repository} holds no safetensors weights. Choose another release of the model, download a .gguf file and "
        "give its path, or convert its weights once with AutoModelForCausalLM's from_pretrained and save_pretrained."
    )


def _is_there(model: HubModel, name: str) -> bool:
    """Whether the repository has a file. A hub that can't be reached is not missed where all shards are here."""
    if (model.folder / name).is_file():
        return True
    try:
        with asked_for(f"{name} of {model.repository}"):
            return file_exists(model.repository, name, revision=model.commit)
    except InputError:
        index = model.folder / INDEX_FILE
        if index.is_file() and all((model.folder / shard).is_file() for shard in read_weight_map(index).values()):
            return False
        raise


def _header(model: HubModel, name: str) -> dict[str, TensorInfo]:
    file = model.folder / name
    if file.is_file():
        return read_header(file)
    with asked_for(f"the header of {name} of {model.repository}"):
        try:
            found = parse_safetensors_file_metadata(model.repository, name, revision=model.commit).tensors
        except EntryNotFoundError:
            found = None
    if found is None:
        raise no_safetensors(model.repository)
    return {key: describe(file, key, info.dtype, info.shape, info.data_offsets) for key, info in found.items()}


class HubFiles(TensorFiles):
    """Reads tensors from the files of a hub model, each fetched into this machine's cache when it is first needed.

    What was fetched stays, as the hub's client has it, so that later stages and later runs find it. Only where the
    disk has no room for the next file, those that this object fetched are dropped, the longest unused first.
    """

    def __init__(self, model: HubModel, tensors: Mapping[str, TensorInfo]):
        self._model = model
        self._sizes: dict[str, int] = {}
        for part in {part for info in tensors.values() for part in info.stored}:
            self._sizes[part.file.name] = self._sizes.get(part.file.name, 0) + part.nbytes
        self._fetched: list[Path] = []  # the longest unused first

    def locate(self, file: Path) -> Path:
        # The first is in the cache of the machine that found the model, which this one may see.
        found = file if file.is_file() else self._model.cached(file.name) or self._fetch(file.name)
        if found in self._fetched:
            self._fetched.remove(found)
            self._fetched.append(found)
        return found

    def map(self, info: TensorInfo) -> Tensor:
        try:
            return map_tensor(self.locate(info.file), info)
        except FileNotFoundError:
            # Another worker of this machine dropped the file just before it was opened here; now it is fetched.
            return map_tensor(self.locate(info.file), info)

    def _fetch(self, name: str) -> Path:
        cache, needed = Path(constants.HF_HUB_CACHE), self._sizes[name] + RESERVE
        while self._fetched and free_bytes(cache) < needed:
            _drop(self._fetched.pop(0))
        try:
            check_free_space(cache, needed)
            self._fetched.append(self._model.fetch(name))
        except InputError as error:
            raise Unreachable(f"node {platform.node()}: {error}") from error
        return self._fetched[-1]


def _drop(file: Path) -> None:
    """Remove a file from the hub's cache; whoever has mapped it keeps it until then."""
    content = file.resolve()
    file.unlink(missing_ok=True)
    content.unlink(missing_ok=True)
