"""From pruned layers to a checkpoint that opens with ``from_pretrained``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from distprune.checkpoint import Checkpoint, ShardWriter, WrittenFile
from distprune.engine.run.layer_files import LayerFiles
from distprune.engine.run.preflight import Job, merged_at_once
from distprune.engine.stages.context import RunContext
from distprune.engine.stages.merging import MergeShards
from distprune.engine.worker.host_tensor import HostTensor, unpack_all
from distprune.engine.worker.write_tasks import Copy
from distprune.export.output_config import modeling_files, output_config, plainest_layout
from distprune.layers.shapes import LayerShape
from distprune.storage import staged

#: Bytes of tensors that a part holds of those that are carried through, unless one is larger.
PART = 256 * 2**20


class Assemble:
    """The stage that turns written parts into a verified checkpoint.

    Args:
        job: the run.
        plan: the shape of every layer.
        files: the layers that are done.
        writer: of their parts.
        folder: what becomes the checkpoint.
    """

    def __init__(
        self,
        context: RunContext,
        job: Job,
        plan: Sequence[LayerShape],
        files: LayerFiles,
        writer: ShardWriter,
        folder: Path,
    ):
        self.context, self.job, self.plan, self.files = context, job, plan, files
        self.writer, self.folder = writer, folder

    def run(self) -> tuple[str, int]:
        """Returns the layout, the plainest that can say the layers' shapes, and the bytes of all tensors."""
        before, after = self._copy()
        layout = self._write_config()
        order = [*before, *self.files.parts(), *after]
        shards = self.writer.begin_assembly(order, self.folder, self.job.config.max_shard_size)
        merged = merged_at_once(self.job.config)
        MergeShards(self.context, merged, self.writer.accept_shard, self.writer.build).run(shards)
        self.writer.finish_assembly()
        return layout, self._verify()

    def _copy(self) -> tuple[list[str], list[str]]:
        """Let the workers copy what is not of the layers: embedding, norm and head a part each, then what pruning
        doesn't know.

        Returns:
            The names of the parts that come before and after the decoder layers.
        """
        pool, progress = self.context.pool, self.context.progress
        parts = {f"outer-{number}": names for number, names in enumerate(copied(self.job))}
        missing = sorted(parts.keys() - self.writer.done())
        progress.stage("Copying embedding and head", len(parts), len(parts) - len(missing))

        def receive(part: str, copy: dict[str, HostTensor] | WrittenFile) -> None:
            if isinstance(copy, WrittenFile):
                self.writer.accept(part, copy)
            else:
                self.writer.put(part, unpack_all(copy))
            progress.advance()

        for part in missing:
            pool.submit(Copy(parts[part]), partial(receive, part))
        pool.run()
        first, *others = parts
        return [first], others

    def _write_config(self) -> str:
        """Write config.json, and the code that the layout needs beside it. Returns the layout."""
        architecture, shapes = self.job.architecture, self.files.said_shapes()
        layout = plainest_layout(architecture, shapes)
        config = output_config(architecture, whole_config(self.job), shapes, layout)
        with staged(self.folder) as local:
            write_files(local, config, modeling_files(layout))
        return layout

    def _verify(self) -> int:
        """See that the finished folder opens and holds every tensor in its planned shape. Returns their bytes.

        Raises:
            InputError: it does not; names the file and tensor.
        """
        finished = Checkpoint.open(self.folder)
        finished.check_shapes(expected_shapes(self.job, self.plan))
        return stored_bytes(finished)


def stored_bytes(checkpoint: Checkpoint) -> int:
    """What all tensors take on disk, their scales included."""
    return sum(part.nbytes for info in checkpoint.tensors.values() for part in info.stored)


def copied(job: Job) -> Iterator[tuple[str, ...]]:
    """The names on disk of what is copied, part by part; the first is the embedding."""
    for name in job.model.outer_names():
        yield (name,)
    group, room = [], PART
    for name in job.model.names.carried:
        size = job.checkpoint.tensors[name].nbytes
        if group and size > room:
            yield tuple(group)
            group, room = [], PART
        group.append(name)
        room -= size
    if group:
        yield tuple(group)


def expected_shapes(job: Job, plan: Sequence[LayerShape]) -> dict[str, tuple[int, ...]]:
    """The dimensions of all tensors of the result, by their names on disk."""
    model, expected = job.model, {}
    for index, shape in enumerate(plan):
        expected |= model.stored_dims(index, shape)
    copies = (*model.outer_names(), *model.names.carried)
    return expected | {name: tuple(job.checkpoint.tensors[name].shape) for name in copies}


def whole_config(job: Job) -> PreTrainedConfig:
    """The model's configuration in transformers' own class: what is pruned runs without code that came with it."""
    whole = job.checkpoint.config
    return whole if type(whole).__module__.startswith("transformers.") else job.architecture.config


def write_files(folder: Path, config: dict[str, Any], code: dict[str, str]) -> None:
    """Write config.json and modules beside it."""
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, text in code.items():
        (folder / name).write_text(text, encoding="utf-8")
