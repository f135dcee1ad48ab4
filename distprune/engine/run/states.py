"""What waits in the journal until a layer needs it: hidden states, gradients of them, and what was seen of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from distprune.engine.run.journal import Journal, entry_of
from distprune.engine.worker.host_tensor import HostTensor, pack, unpack

# Kinds of entries: the hidden states at a layer's input that the dense model gives, and those that its pruned
# predecessors give; the loss's gradients at a layer's output; and the moments of the dense model's that pruning needs.
DENSE, PRUNED, GRADIENT, MOMENTS = "dense", "pruned", "gradient", "moments"


def save_states(journal: Journal, kind: str, index: int, pieces: Sequence[HostTensor]) -> None:
    """Keep the states of that kind of layer ``index``, which came in pieces."""
    journal.write(entry_of(kind, index), tensors={f"{number:05}": unpack(piece) for number, piece in enumerate(pieces)})


def load_states(journal: Journal, kind: str, index: int, samples: slice = slice(None)) -> HostTensor:
    """Those hidden states, whole or of some samples."""
    pieces = journal.tensors(entry_of(kind, index))
    start, taken = 0, []
    first, end, _ = samples.indices(sum(map(len, pieces.values())))
    for name in sorted(pieces):
        piece = pieces[name]
        if start < end and start + len(piece) > first:
            taken.append(piece[max(0, first - start) : end - start])
        start += len(piece)
    return pack(torch.cat(taken) if len(taken) > 1 else taken[0])
