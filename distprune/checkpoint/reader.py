"""A Hugging Face checkpoint, read tensor by tensor without building the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from transformers import AutoConfig, PretrainedConfig
from upath import UPath

from distprune.checkpoint.fingerprint import compute_fingerprint
from distprune.checkpoint.fp8 import with_scales
from distprune.checkpoint.headers import read_header
from distprune.checkpoint.infos import TensorInfo
from distprune.checkpoint.layout import (
    CONFIG_FILE,
    find_entry,
    find_weight_files,
    is_index,
    read_json,
    read_weight_map,
    refuse_adapter,
    require_checkpoint,
)
from distprune.checkpoint.mxfp4 import with_blocks
from distprune.checkpoint.quantization import (
    Fp8Scheme,
    Scheme,
    find_scheme,
    forget_quantization,
    notes_on,
    refuse_packed,
)
from distprune.checkpoint.remote import fetch_model, fingerprint_of
from distprune.checkpoint.tensors import TensorFiles, TensorSource, is_finite
from distprune.errors import InputError
from distprune.storage import is_remote, location

LISTED = 5
HEADERS_AT_ONCE = 8
#: Of a tensor that is read to look at it alone.
PART_BYTES = 2**30


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint: its configuration, what is known of its tensors from the files' headers, and their source.

    ``notes`` are what the user should know of how it is read, such as that it is dequantized. The configuration of a
    quantized model that is dequantized says nothing of it.
    """

    path: Path
    config: PretrainedConfig
    tensors: Mapping[str, TensorInfo]
    source: TensorSource = field(default_factory=TensorFiles, compare=False)
    notes: tuple[str, ...] = ()

    @classmethod
    def open(cls, path: Path | UPath | str, trust_remote_code: bool = False) -> Checkpoint:
        """Open a checkpoint folder: config.json and one safetensors file, or an index and its shards.

        Of one in an object store, what lies beside the weights is fetched, and of these the headers; `path` is then
        the folder in this machine's cache.

        InputError: a file is missing, broken or not what the index says; the checkpoint is quantized in a form that
        is not dequantized on reading, or has an adapter; transformers does not know the architecture.
        """
        place = location(path)
        require_checkpoint(place)
        refuse_adapter(place)
        path = fetch_model(place, weights=False) if is_remote(place) else place
        config, scheme = read_config(path, trust_remote_code)
        entry = find_entry(path, lambda name: (place / name).is_file())
        files = find_weight_files(place, place / entry.name)
        with ThreadPoolExecutor(HEADERS_AT_ONCE) as threads:
            headers = dict(zip(files, threads.map(read_header, files), strict=True))
        by_name = {str(file).removeprefix(f"{place}/"): header for file, header in headers.items()}
        return cls(path, config, tensors_of(place / entry.name, by_name, scheme), notes=notes_on(scheme))

    def whole_folder(self) -> Path:
        """A folder of this machine that holds all of it; an object store's is fetched into the cache."""
        files = self.weight_files
        return fetch_model(files[0].parent) if files and is_remote(files[0]) else self.path

    @property
    def weight_files(self) -> list[Path]:
        """The files that hold the tensors, sorted."""
        return sorted({part.file for info in self.tensors.values() for part in info.stored})

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The named tensors on the CPU, in the order asked for: as stored, or dequantized as `tensors` says."""
        return self.source.read({name: self._info(name) for name in names})

    def read_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Rows (first dimension) of one tensor on the CPU, such as some tokens' embeddings.

        `rows` holds int64 indices of any shape, repeats allowed; the result has shape
        (*rows.shape, *tensor.shape[1:]). No more than those rows is read.
        """
        return self.source.read_rows(name, self._info(name), rows.cpu())

    def check_shapes(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Raise InputError unless every tensor in `expected` is there with that shape."""
        missing = [name for name in expected if name not in self.tensors]
        if missing:
            raise InputError(
                f"{self.path} lacks {len(missing)} tensor(s) that its config.json calls for: "
                f"{_listed(missing)}. Check that config.json belongs to these weights and that "
                "the download is complete."
            )
        wrong = [
            f"{name} in {info.file} has shape {info.shape}, expected {tuple(shape)}"
            for name, shape in expected.items()
            if (info := self.tensors[name]).shape != tuple(shape)
        ]
        if wrong:
            raise InputError(
                f"{len(wrong)} tensor(s) have other shapes than config.json calls for: "
                f"{_listed(wrong, '; ')}. Check that config.json belongs to these weights."
            )

    def check_finite(self, names: Iterable[str]) -> None:
        """Read the named tensors, one at a time, and raise InputError where one holds NaN or infinity."""
        for name in names:
            if not all(map(is_finite, in_parts(self, name))):
                raise InputError(
                    f"{self._info(name).file}: tensor {name} holds NaN or infinite values. "
                    "Download the file again, or use a release of the model without them."
                )

    def fingerprint(self) -> str:
        """The checkpoint's identity; see `compute_fingerprint` for what it catches and what it misses."""
        files = self.weight_files
        if files and is_remote(files[0]):
            beside = files[0].parent / CONFIG_FILE
            return fingerprint_of({file.name: file for file in (beside, *files)})
        return compute_fingerprint(self.path, files)

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise InputError(f"{self.path} holds no tensor {name}. Check that config.json belongs to these weights.")
        return self.tensors[name]


class ReadsTensors(Protocol):
    """A checkpoint, as far as its tensors are read."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]: ...

    def read_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor: ...


def in_parts(checkpoint: ReadsTensors, name: str) -> Iterator[torch.Tensor]:
    """A tensor; a large one, such as all experts of a layer, some of its rows at a time."""
    info = checkpoint.tensors[name]
    if info.nbytes <= PART_BYTES:
        yield checkpoint.read([name])[name]
        return
    for rows in torch.arange(info.shape[0]).split(max(1, PART_BYTES * info.shape[0] // info.nbytes)):
        yield checkpoint.read_rows(name, rows)


def read_config(path: Path, trust_remote_code: bool) -> tuple[PretrainedConfig, Scheme | None]:
    """A folder's config.json, without a word of its quantization, and what it said of that.

    InputError: it is broken, of an unknown architecture, or of a model that is quantized in a form that is not read.
    """
    file = path / CONFIG_FILE
    scheme = find_scheme(file, read_json(file))
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers and a checkpoint's own code raise all kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"transformers can't read {file}: {reason}") from error
    if scheme:
        forget_quantization(config)
    return config, scheme


def tensors_of(
    entry: Path, headers: Mapping[str, Mapping[str, TensorInfo]], scheme: Scheme | None
) -> dict[str, TensorInfo]:
    """All tensors of the weights that are opened by `entry`, given each file's header by its name.

    Those that are quantized are described as they are read, dequantized.

    InputError: an index has a tensor in a file that does not hold it, or the weights are packed by a quantizer.
    """
    if is_index(entry):
        tensors = _indexed_tensors(entry, headers)
    else:
        tensors = {name: info for header in headers.values() for name, info in header.items()}
    if scheme:
        tensors = with_scales(tensors, scheme) if isinstance(scheme, Fp8Scheme) else with_blocks(tensors)
    refuse_packed(tensors, scheme)
    return tensors


def _indexed_tensors(index: Path, headers: Mapping[str, Mapping[str, TensorInfo]]) -> dict[str, TensorInfo]:
    weight_map = read_weight_map(index)
    absent = [f"{name} in {shard}" for name, shard in weight_map.items() if name not in headers[shard]]
    if absent:
        raise InputError(
            f"{index} names {len(absent)} tensor(s) that their shard does not hold: "
            f"{_listed(absent)}. The index and the shards are of different downloads: download them again."
        )
    return {name: headers[shard][name] for name, shard in weight_map.items()}


def _listed(items: list[str], separator: str = ", ") -> str:
    return separator.join(items[:LISTED]) + (f"{separator}..." if len(items) > LISTED else "")
