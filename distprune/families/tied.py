"""What a configuration that ties the head to the embedding means, given what the checkpoint stores.

transformers decides the same when it loads a model: a tie is symmetric, so that either tensor may stand for both; and
where both are stored and differ, the model is not tied, whatever its configuration says.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from distprune.checkpoint import Checkpoint
from distprune.families.disk_names import DiskNames

#: Bytes of each of the two tensors that are compared at once.
PIECE = 64 * 2**20

UNTIED = (
    "config.json ties the head to the embedding, but the model stores both and they differ: it is pruned as the untied "
    "model that it is, and the result's config.json says so (tie_word_embeddings: false)."
)


def untied(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with a configuration that ties nothing."""
    config = copy.deepcopy(checkpoint.config)
    for each in (config, config.get_text_config(decoder=True)):
        each.tie_word_embeddings = False
    return replace(checkpoint, config=config)


def differ_though_tied(model: PreTrainedModel, checkpoint: Checkpoint, names: DiskNames) -> bool:
    """Whether tensors that the model ties are stored apart and differ, so that transformers won't tie them.

    Reads both of two such tensors, a piece of each at a time and up to the first difference.

    Args:
        model: on the meta device, with what its configuration ties.
    """
    stored = [
        (names.on_disk(one), names.on_disk(other))
        for one, other in model.all_tied_weights_keys.items()
        if one in names.stored and other in names.stored
    ]
    return any(one != other and not are_equal(checkpoint, one, other) for one, other in stored)


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
