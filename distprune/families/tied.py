"""What a configuration that ties the head to the embedding means, given what the checkpoint stores.

transformers decides the same when it loads a model: a tie is symmetric, so that either tensor may stand for both; and
where both are stored and differ, the model is not tied, whatever its configuration says.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from distprune.checkpoint import Checkpoint
from distprune.families.disk_names import DiskNames

#: Bytes of each of the two tensors that are compared at once.
PIECE = 64 * 2**20

UNTIED = (
    "config.json ties the head to the embedding, but the model stores both and they differ: it is pruned as the untied "
    "model that it is, and the result's config.json says so (tie_word_embeddings: false)."
)


def untied_where_different(checkpoint: Checkpoint, names: DiskNames, embedding: str, head: str) -> Checkpoint:
    """The checkpoint with a configuration that is not tied where it stores a head that is no copy of the embedding.

    Reads both tensors where there are two, a piece of each at a time and up to the first difference.

    Args:
        checkpoint: of a model whose configuration may tie the two.
        names: what it calls its tensors.
        embedding: the embedding's name in the model's module tree.
        head: the head's.
    """
    one, other = names.on_disk(embedding), names.on_disk(head)
    if one == other or other not in checkpoint.tensors or not is_tied(checkpoint):
        return checkpoint
    if are_equal(checkpoint, one, other):
        return checkpoint
    config = copy.deepcopy(checkpoint.config)
    for each in (config, config.get_text_config(decoder=True)):
        each.tie_word_embeddings = False
    return replace(checkpoint, config=config)


def is_tied(checkpoint: Checkpoint) -> bool:
    """Whether the configuration ties the head to the embedding."""
    return bool(checkpoint.config.tie_word_embeddings)


def are_equal(checkpoint: Checkpoint, name: str, other: str) -> bool:
    """Whether two stored tensors hold the same numbers, be it in different dtypes."""
    info, rows = checkpoint.tensors[name], checkpoint.tensors[name].shape[0]
    if info.shape != checkpoint.tensors[other].shape:
        return False
    at_once = max(1, PIECE * rows // max(info.nbytes, 1))
    return all(
        bool((checkpoint.read_rows(name, piece) == checkpoint.read_rows(other, piece)).all())
        for piece in torch.arange(rows).split(at_once)
    )
