"""What stands under the name of a linear map that pruning has changed: two factors, or a narrow matrix, or both.

The original class goes on calling the map by its name and gets an output of the width that it expects: what was removed
is filled with zeros, which change no score and no sum. This file travels inside checkpoints, so it imports torch alone.
"""

from __future__ import annotations

import torch
from torch import nn

#: Where the matrices lie that stand in for others, each under the name of the one that it replaces. So whatever finds
#: linear maps by the last part of their name, as PEFT's `target_modules` does, finds every one of them. A module of its
#: own for two factors, called `q_proj`, would be found before its factors and refused; made a subclass of `nn.Linear`,
#: it would be taken for a dense matrix by what replaces those: quantizers and vLLM.
LEFT, RIGHT, NARROW = "left", "right", "narrow"


class Columns:
    """The places in a row of some width that hold what is kept: one list of places for each of the row's heads."""

    def __init__(self, places: list[list[int]], width: int):
        self.heads, self.kept, self.width = len(places), len(places[0]), width
        flat = [head * width + place for head, of_head in enumerate(places) for place in of_head]
        self._kept = flat
        # For every place of the whole row where its value is in the kept one; a zero stands behind the kept one.
        where = {place: number for number, place in enumerate(flat)}
        self._where = [where.get(place, len(flat)) for place in range(self.heads * width)]
        self._tensors: dict[tuple[str, torch.device], torch.Tensor] = {}

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """The kept ones of x, (.., heads * width) -> (.., heads * kept)."""
        return x.index_select(-1, self._index("_kept", x.device))

    def scatter(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse, with zeros for what was not kept."""
        return nn.functional.pad(x, (0, 1)).index_select(-1, self._index("_where", x.device))

    def _index(self, name: str, device: torch.device) -> torch.Tensor:
        # Made from Python's own numbers when first asked for: buffers of a model that is built on the meta device would
        # have to be filled from a checkpoint, and some servers cast all of these to their dtype.
        key = name, device
        if key not in self._tensors:
            with torch.inference_mode(False):  # else no backward pass could use it later
                self._tensors[key] = torch.tensor(getattr(self, name), device=device)
        return self._tensors[key]


class Projection:
    """A linear map of a module, changed: called as the map was."""

    def __init__(self, parent: nn.Module, name: str, gather: Columns | None = None, scatter: Columns | None = None):
        self.parent, self.name, self.gathered, self.scattered = parent, name, gather, scatter

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x if self.gathered is None else self.gathered.gather(x)
        # Looked up at each call, since adapters and servers put modules of their own in the place of these.
        if self.name in self.parent.right:
            x = self.parent.left[self.name](self.parent.right[self.name](x))
        else:
            x = self.parent.narrow[self.name](x)
        return x if self.scattered is None else self.scattered.scatter(x)


class JoinedProjections:
    """Several of them that the original class calls as one: one output after the other, or head by head."""

    def __init__(self, projections: list[Projection], heads: int | None = None):
        self.projections, self.heads = projections, heads

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        outputs = [projection(x) for projection in self.projections]
        if self.heads is None:
            return torch.cat(outputs, dim=-1)
        return torch.cat([output.unflatten(-1, (self.heads, -1)) for output in outputs], dim=-1).flatten(-2)


def add_places(parent: nn.Module) -> None:
    """Give a module room for what stands in for its linear maps."""
    for place in (LEFT, RIGHT, NARROW):
        if place not in parent._modules:
            parent.add_module(place, nn.ModuleDict())


def put_matrix(parent: nn.Module, name: str, in_features: int, out_features: int, rank: int | None, bias: bool) -> None:
    """Add a linear map's matrix, or its two factors where it has a rank, under its name."""
    add_places(parent)
    if rank is None:
        parent.narrow[name] = nn.Linear(in_features, out_features, bias=bias)
    else:
        parent.right[name] = nn.Linear(in_features, rank, bias=False)
        parent.left[name] = nn.Linear(rank, out_features, bias=bias)


def put_in_place(parent: nn.Module, name: str, stand_in: Projection | JoinedProjections) -> None:
    """Let a module call something else under the name of its linear map."""
    if name in parent._modules:
        del parent._modules[name]
    # Past nn.Module's own bookkeeping: what is called is no module, and its matrices are found elsewhere.
    object.__setattr__(parent, name, stand_in)


def ends(parent: nn.Module, name: str) -> tuple[nn.Module, nn.Module]:
    """The module that takes the input of the map of that name, and the one that gives its output."""
    if name in parent._modules:
        return parent._modules[name], parent._modules[name]
    if name in parent.right:
        return parent.right[name], parent.left[name]
    return parent.narrow[name], parent.narrow[name]
