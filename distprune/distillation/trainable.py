"""A pruned layer as a module that trains: all of its weights, or low-rank updates that are folded in at the end."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distprune.config import DistillConfig
from distprune.layers.names import stored_like
from distprune.layers.parts import DecoderLayer
from distprune.layers.runner import LayerRunner

BETAS = (0.9, 0.95)


class TrainableLayer:
    """What trains is in float32, all else in bfloat16 where the run is in bfloat16.

    Args:
        layer: stays as it is; it may have low-rank factors and a linear branch, which train too.
        index: which layer of the model it is.
        runner: what runs it, and on which device.
        options: what of it trains.
    """

    def __init__(self, layer: DecoderLayer, index: int, runner: LayerRunner, options: DistillConfig):
        self._pruned, self._index, self._runner = layer, index, runner
        left_alone = {*runner.architecture.unknown_modules(index)}
        if not options.train_routers and (router := runner.architecture.names(index).router) is not None:
            left_alone.add(router)
        if options.train == "full":
            # Copied, so that the layer itself stays as it is.
            self._module = runner.build(layer.to(torch.float32, copy=True), index, torch.float32).requires_grad_(True)
        else:
            self._module = runner.build(layer, index, runner.gradient_dtype).requires_grad_(False)
            self._add_updates(options.rank, torch.Generator().manual_seed(options.seed), left_alone)
        self._leave_alone(left_alone)
        if layer.attention is None and layer.ffn is None:  # its norms alone change nothing
            self._module.requires_grad_(False)

    def _add_updates(self, rank: int, generator: torch.Generator, left_alone: set[str]) -> None:
        """Experts have none: all of a layer's are one tensor, and no linear map."""
        for name, module in list(self._module.named_modules()):
            if isinstance(module, nn.Linear) and not left_alone.intersection((name, name.split(".")[0])):
                self._module.set_submodule(name, UpdatedLinear(module, rank, generator))

    def _leave_alone(self, modules: set[str]) -> None:
        """What is of no part that is known goes through distillation as it is, too, and so do routers."""
        for name in modules:
            self._module.get_submodule(name).requires_grad_(False)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Those that train."""
        return {name: tensor for name, tensor in self._module.named_parameters() if tensor.requires_grad}

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Its output for hidden states in the runner's dtype for gradients, on its device."""
        dtype, device = self._runner.gradient_dtype, self._runner.device
        if dtype == torch.float32 or not _is_supported(device):
            return self._runner.forward(self._module, self._index, hidden_states)
        with torch.autocast(device.type, dtype):
            return self._runner.forward(self._module, self._index, hidden_states)

    def layer(self) -> DecoderLayer:
        """The layer as it is now in the given one's dtypes, low-rank updates folded in."""
        updated = {name: module for name, module in self._module.named_modules() if isinstance(module, UpdatedLinear)}
        names, pairs = self._runner.architecture.names(self._index), None
        if updated:
            state = names.state_of(self._pruned.to(self._runner.device))
            state |= {f"{name}.weight": module.folded(state[f"{name}.weight"]) for name, module in updated.items()}
        else:
            state = {name: tensor.detach() for name, tensor in self._module.state_dict().items()}
        if self._pruned.attention is not None:
            pairs = self._pruned.attention.rotary_pairs
        return stored_like(names.layer_from_state(state, self._pruned.shape, pairs), self._pruned, names)


class UpdatedLinear(nn.Module):
    """A linear map of W + BA (LoRA, Hu et al., ICLR 2022), B zero at the start. W gets no gradient, which would cost as
    much as that of its input."""

    def __init__(self, linear: nn.Linear, rank: int, generator: torch.Generator):
        super().__init__()
        self.linear = linear
        out_features, in_features = linear.weight.shape
        rank, device = min(rank, out_features, in_features), linear.weight.device
        start = torch.randn(rank, in_features, generator=generator) / math.sqrt(in_features)
        self.right = nn.Parameter(start.to(device))
        self.left = nn.Parameter(torch.zeros(out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + F.linear(F.linear(x, self.right), self.left)

    def folded(self, weight: Tensor) -> Tensor:
        """W + BA of a weight W, (out, in) in its dtype."""
        return (weight.float() + self.left.detach() @ self.right.detach()).to(weight.dtype)


def adam_w(parameters: Iterable[nn.Parameter], learning_rate: float) -> torch.optim.AdamW:
    """Both distillations' optimizer, one kernel a step."""
    parameters = list(parameters)
    fused = all(_is_supported(parameter.device) for parameter in parameters)
    return torch.optim.AdamW(parameters, learning_rate, BETAS, weight_decay=0.0, fused=fused)


def _is_supported(device: torch.device) -> bool:
    """Whether torch has automatic casts and fused optimizers there: not on the device that a plan imagines."""
    return torch.amp.is_autocast_available(device.type)
