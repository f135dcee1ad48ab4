"""From pruned layers to a checkpoint that opens with ``from_pretrained``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from distprune.budgets import is_stock
from distprune.checkpoint import Checkpoint, ShardWriter, WrittenFile
from distprune.decoder_layer import LayerShape
from distprune.engine.scheduler.pool import WorkerPool
from distprune.engine.run.preflight import Job, merged_at_once
from distprune.engine.telemetry.progress import Progress
from distprune.engine.stages.pruning_pass import merge_shards
from distprune.engine.worker.host_tensor import HostTensor, unpack
from distprune.modeling import AUTO_MAP, PrunedConfig, copy_modeling_files
from distprune.storage import staged


def copy_outer_tensors(
    job: Job, writer: ShardWriter, pool: WorkerPool, progress: Progress
) -> tuple[list[str], list[str]]:
    """Let the workers copy embedding, final norm and head through, a part each.

    Returns:
        The names of the parts that come before and after the decoder layers.
    """
    parts = {f"outer-{number}": name for number, name in enumerate(job.family.outer_shapes(job.dense))}
    missing = sorted(parts.keys() - writer.done())
    progress.stage("Copying embedding and head", len(parts), len(parts) - len(missing))

    def receive(part: str, copied: HostTensor | WrittenFile) -> None:
        if isinstance(copied, WrittenFile):
            writer.accept(part, copied)
        else:
            writer.put(part, {parts[part]: unpack(copied)})
        progress.advance()

    for part in missing:
        pool.submit(partial(receive, part), "copy_outer", parts[part])
    pool.run()
    first, *others = parts
    return [first], others


def write_config(job: Job, shapes: Sequence[LayerShape], folder: Path) -> str:
    """Write config.json, and the modeling files where the checkpoint needs them.

    Returns:
        The layout: "stock" (the original architecture) or "per-layer" (our class).
    """
    with staged(folder) as local:
        if is_stock(job.dense, shapes):
            job.family.stock_config(job.checkpoint.config, shapes[0]).save_pretrained(local)
            return "stock"
        config = pruned_config(job, shapes)
        config.save_pretrained(local)
        copy_modeling_files(local)
        return "per-layer"


def pruned_config(job: Job, shapes: Sequence[LayerShape]) -> PrunedConfig:
    config = type(job.dense)(**{**job.dense.to_dict(), "layer_shapes": [asdict(shape) for shape in shapes]})
    config.architectures = ["PrunedForCausalLM"]
    config.auto_map = AUTO_MAP
    return config


def verify(job: Job, shapes: Sequence[LayerShape], folder: Path) -> None:
    """See that the finished folder opens and holds every tensor in its planned shape.

    Raises:
        InputError: it does not; names the file and tensor.
    """
    Checkpoint.open(folder).check_shapes(job.family.tensor_shapes(pruned_config(job, shapes)))


def assemble(
    job: Job,
    shapes: Sequence[LayerShape],
    layer_parts: Sequence[str],
    writer: ShardWriter,
    folder: Path,
    pool: WorkerPool,
    progress: Progress,
) -> str:
    """Turn the written parts into a verified checkpoint in ``folder``. Returns the layout."""
    before, after = copy_outer_tensors(job, writer, pool, progress)
    layout = write_config(job, shapes, folder)
    shards = writer.begin_assembly([*before, *layer_parts, *after], folder, job.config.max_shard_size)
    merge_shards(pool, shards, writer.accept_shard, writer.build, merged_at_once(job.config), progress)
    writer.finish_assembly()
    verify(job, shapes, folder)
    return layout
