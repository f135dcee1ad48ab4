"""What waits in the journal until a layer needs it: hidden states, and what was seen of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from distprune.engine.journal import Journal, entry_of
from distprune.engine.transport import Parcel, pack, unpack

# Kinds of entries: the hidden states at a layer's input that the dense model gives, and those that its pruned
# predecessors give; and the moments that pruning needs of the former.
DENSE, PRUNED, CARRIED = "dense", "pruned", "carried"


def save_states(journal: Journal, kind: str, index: int, pieces: Sequence[Parcel]) -> None:
    """Keep the hidden states at the input of layer ``index``, which came in pieces."""
    journal.write(entry_of(kind, index), tensors={f"{number:05}": unpack(piece) for number, piece in enumerate(pieces)})


def load_states(journal: Journal, kind: str, index: int) -> Parcel:
    """Those hidden states, whole."""
    pieces = journal.tensors(entry_of(kind, index))
    return pack(torch.cat([pieces[name] for name in sorted(pieces)]) if len(pieces) > 1 else pieces["00000"])
