"""From pruned layers to a checkpoint that opens with ``from_pretrained``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from distprune.checkpoint import Checkpoint, ShardWriter
from distprune.decoder_layer import LayerShape
from distprune.engine.preflight import Job
from distprune.modeling import AUTO_MAP, PrunedConfig, copy_modeling_files


def write_outer_tensors(job: Job, writer: ShardWriter) -> tuple[list[str], list[str]]:
    """Copy embedding, final norm and head through, one tensor at a time.

    Returns:
        The names of the parts that come before and after the decoder layers.
    """
    parts, done = [], writer.done()
    for number, name in enumerate(job.family.outer_shapes(job.dense)):
        parts.append(f"outer-{number}")
        if parts[-1] not in done:
            writer.put(parts[-1], job.checkpoint.read([name]))
    return parts[:1], parts[1:]


def is_stock(job: Job, shapes: Sequence[LayerShape]) -> bool:
    """Whether a plain configuration of the original architecture can describe the shapes.

    It can where all layers have the same heads and FFN width, and all else of the dense layer.
    """
    one = shapes[0]
    if not (one.has_attention and one.has_ffn and all(shape == one for shape in shapes)):
        return False
    widths = {"query_heads": one.query_heads, "kv_heads": one.kv_heads, "ffn_width": one.ffn_width}
    is_narrower = one == replace(job.dense.dense_shape(), **widths)
    return is_narrower and job.family.takes_heads(job.checkpoint.config, one.query_heads)


def write_config(job: Job, shapes: Sequence[LayerShape], folder: Path) -> str:
    """Write config.json, and the modeling files where the checkpoint needs them.

    Returns:
        The layout: "stock" (the original architecture) or "per-layer" (our class).
    """
    if is_stock(job, shapes):
        job.family.stock_config(job.checkpoint.config, shapes[0]).save_pretrained(folder)
        return "stock"
    config = pruned_config(job, shapes)
    config.save_pretrained(folder)
    copy_modeling_files(folder)
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
    job: Job, shapes: Sequence[LayerShape], layer_parts: Sequence[str], writer: ShardWriter, folder: Path
) -> str:
    """Turn the written parts into a verified checkpoint in ``folder``. Returns the layout."""
    before, after = write_outer_tensors(job, writer)
    layout = write_config(job, shapes, folder)
    writer.assemble([*before, *layer_parts, *after], folder, job.config.max_shard_size)
    verify(job, shapes, folder)
    return layout
