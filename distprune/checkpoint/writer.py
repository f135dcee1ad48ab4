"""Writing a checkpoint's weights as its layers stream in, with no more than one shard in memory."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from distprune.checkpoint.assembly import Assembly, plan_assembly
from distprune.checkpoint.disk import GB
from distprune.checkpoint.durable import move, read_tensors, write_tensors, write_text
from distprune.checkpoint.headers import read_header
from distprune.checkpoint.layout import INDEX_FILE
from distprune.checkpoint.part_folder import OFFERED, SUFFIX, PartFolder, WrittenFile, separate_in_memory
from distprune.checkpoint.piecewise import piecewise_file
from distprune.errors import StorageFailed
from distprune.storage import location, make_folder

# Seconds within which a network file system shows a file that another machine has written.
VISIBLE_WITHIN = 90.0


class ShardWriter:
    """Collects parts (one decoder layer each, say) in `work_dir/parts/` and assembles them into shards.

    Every file appears wholly or not at all, so after a crash at any moment `done()` tells what need not be
    made again, and `assemble` goes on where it stopped. The bytes written depend on names, values and order
    alone. A work folder has one writer at a time: opening it removes what a killed one left unfinished.
    Other processes may write parts and shards for it, see `announce`.
    """

    def __init__(self, work_dir: Path) -> None:
        self._parts = location(work_dir) / "parts"
        self._plan_file = self._parts / "assembly.json"
        make_folder(self._parts)
        self._remove_unfinished()

    def _remove_unfinished(self) -> None:
        for pattern in ("*.tmp", ".tmp*", f"*{OFFERED}"):
            for unfinished in self._parts.glob(pattern):
                unfinished.unlink(missing_ok=True)

    def announce(self) -> PartFolder:
        """What other processes must know to write files here, which `accept` and `accept_shard` take."""
        return PartFolder.announce(self._parts)

    def accept(self, part: str, written: WrittenFile) -> None:
        """Let a file that another process has written be a part. It replaces the same part of before.

        Raises:
            StorageFailed: the file does not become visible here.
        """
        move(self._seen(written), self._part_file(part))

    def put(self, part: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write one part durably. The same part written again replaces the first.

        Tensors may lie on any device, be views of each other or not be contiguous; each is stored in full.
        """
        write_tensors(self._part_file(part), separate_in_memory(tensors))

    def join(self, part: str, pieces: Sequence[Mapping[str, torch.Tensor] | WrittenFile]) -> None:
        """Write one part of pieces, some of them files that other processes have written, with one in memory at a time.

        What has the same name in several is joined along the first dimension, in the order of the pieces.

        Raises:
            StorageFailed: a file does not become visible here.
        """
        opened = [self._seen(piece) if isinstance(piece, WrittenFile) else piece for piece in pieces]
        with piecewise_file(self._part_file(part), joined_dims(map(without_values, opened))) as file:
            for piece in opened:
                file.write(piece if isinstance(piece, Mapping) else read_tensors(piece))
        for piece in opened:
            if not isinstance(piece, Mapping):
                piece.unlink()

    def read(self, part: str) -> dict[str, torch.Tensor]:
        """The tensors of a part that waits in a file of its own."""
        return read_tensors(self._part_file(part))

    def drop(self, part: str) -> None:
        """Remove a part, if it is there."""
        self._part_file(part).unlink(missing_ok=True)

    def done(self) -> set[str]:
        """The parts that are safely on disk, in a file of their own or in a finished shard."""
        return self._waiting() | {part for parts in self._built_shards().values() for part in parts}

    def assemble(self, order: Sequence[str], destination: Path, max_shard_bytes: int = 5 * GB) -> None:
        """Make `destination` hold all parts as shards, in that order, and their index if there are several.

        A shard of one part is the part's file, moved; only a shard of several is written anew. May be called
        again after a crash, or when it has finished. ValueError: as `begin_assembly`.
        """
        for shard in self.begin_assembly(order, destination, max_shard_bytes):
            self.build(shard)
        self.finish_assembly()

    def begin_assembly(self, order: Sequence[str], destination: Path, max_shard_bytes: int) -> dict[str, list[str]]:
        """Settle which parts make up which shard, or go on with what an earlier process has settled.

        Returns:
            The shards of several parts that are yet to be built, with the names of their parts.

        Raises:
            ValueError: `order` does not name each part once, two parts hold a tensor of the same name, `destination`
                holds other weights, or an assembly begun earlier had another order, destination or shard size.
        """
        self._destination = location(destination)
        make_folder(self._destination)
        self._remove_unfinished()
        self._assembly = self._plan(list(order), self._destination, max_shard_bytes)
        for shard, parts in self._assembly.shards.items():
            if len(parts) == 1 or self._is_built(shard):
                self.build(shard)
        return {shard: parts for shard, parts in self._assembly.shards.items() if not self._is_built(shard)}

    def build(self, shard: str) -> None:
        """Make one shard of the assembly that was begun, unless it is there, and remove its parts."""
        parts = self._assembly.shards[shard]
        if not self._is_built(shard):
            if len(parts) == 1:
                move(self._part_file(parts[0]), self._destination / shard)
            else:
                tensors = {name: tensor for part in parts for name, tensor in self.read(part).items()}
                write_tensors(self._destination / shard, tensors, scratch=self._parts)
        self._drop_all(parts)

    def accept_shard(self, shard: str, written: WrittenFile) -> None:
        """Let a file that another process has merged from the shard's parts be that shard.

        Raises:
            StorageFailed: the file does not become visible here.
        """
        move(self._seen(written), self._destination / shard)
        self._drop_all(self._assembly.shards[shard])

    def finish_assembly(self) -> None:
        """Write the index, if there are several shards."""
        if len(self._assembly.shards) > 1:
            _write_index(self._destination, list(self._assembly.shards))

    def discard(self) -> None:
        """Remove the parts folder, and with it the knowledge of what is done: for a finished checkpoint."""
        shutil.rmtree(self._parts)

    def _part_file(self, part: str) -> Path:
        return self._parts / (part + SUFFIX)

    def _size(self, part: str) -> int:
        """Bytes of a part's file; 0 for a part without tensors."""
        file = self._part_file(part)
        return file.stat().st_size if read_header(file) else 0

    def _waiting(self) -> set[str]:
        return {file.name.removesuffix(SUFFIX) for file in self._parts.glob("*" + SUFFIX)}

    def _built_shards(self) -> dict[str, list[str]]:
        plan = Assembly.load(self._plan_file)
        return plan.built(self._plan_file) if plan else {}

    def _plan(self, order: list[str], destination: Path, max_shard_bytes: int) -> Assembly:
        if self._built_shards():
            return self._resumed_plan(order, destination, max_shard_bytes)
        if len(set(order)) != len(order) or set(order) != self._waiting():
            differing = sorted(set(order) ^ self._waiting())
            raise ValueError(f"order must name each part in {self._parts} once; it differs in {differing}")
        if any(destination.glob("*" + SUFFIX)):
            raise ValueError(f"{destination} holds safetensors files of something else")
        self._refuse_repeated_tensors(order)
        sizes = {part: self._size(part) for part in order}
        plan = plan_assembly(self._plan_file, destination, order, sizes, max_shard_bytes)
        plan.save(self._plan_file)
        return plan

    def _resumed_plan(self, order: list[str], destination: Path, max_shard_bytes: int) -> Assembly:
        plan = Assembly.load(self._plan_file)
        same_place = (self._plan_file.parent / plan.destination).resolve() == destination.resolve()
        if not same_place or (plan.order, plan.max_shard_bytes) != (order, max_shard_bytes):
            raise ValueError(f"{self._plan_file} is an assembly begun with another order, destination or shard size")
        return plan

    def _refuse_repeated_tensors(self, order: list[str]) -> None:
        owner: dict[str, str] = {}
        for part in order:
            for name in read_header(self._part_file(part)):
                if name in owner:
                    raise ValueError(f"tensor {name} is both in part {owner[name]} and in part {part}")
                owner[name] = part

    def _is_built(self, shard: str) -> bool:
        return (self._destination / shard).is_file()

    def _drop_all(self, parts: Sequence[str]) -> None:
        for part in parts:
            self.drop(part)

    def _seen(self, written: WrittenFile) -> Path:
        """A written file, once this process sees it whole."""
        file, began = self._parts / written.name, time.monotonic()
        while not (file.is_file() and file.stat().st_size == written.size):
            if time.monotonic() - began > VISIBLE_WITHIN:
                raise StorageFailed(
                    f"{file}: a worker has written it, and it can't be seen here with its {written.size} bytes. Check "
                    "the file system that both see, or give --writes driver; the same command resumes."
                )
            time.sleep(0.1)
        return file


def without_values(piece: Mapping[str, torch.Tensor] | Path) -> dict[str, torch.Tensor]:
    """The tensors of a piece, or of the file of one, on the meta device."""
    infos = piece if isinstance(piece, Mapping) else read_header(piece)
    return {name: torch.empty(info.shape, dtype=info.dtype, device="meta") for name, info in infos.items()}


def joined_dims(pieces: Iterable[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """What pieces without values give, those of the same name joined along the first dimension."""
    joined: dict[str, torch.Tensor] = {}
    for piece in pieces:
        for name, tensor in piece.items():
            joined[name] = torch.cat([joined[name], tensor]) if name in joined else tensor
    return joined


def _write_index(folder: Path, shards: list[str]) -> None:
    infos = {(name, shard): info for shard in shards for name, info in read_header(folder / shard).items()}
    index = {
        "metadata": {
            "total_parameters": sum(math.prod(info.shape) for info in infos.values() if info.dtype.is_floating_point),
            "total_size": sum(info.nbytes for info in infos.values()),
        },
        "weight_map": dict(sorted(infos)),
    }
    write_text(folder / INDEX_FILE, json.dumps(index, indent=2) + "\n")
