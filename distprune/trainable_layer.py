"""A pruned layer as a module that trains: all of its weights, or low-rank updates that are folded in at the end."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from distprune.config import DistillConfig
from distprune.decoder_layer import DecoderLayer, layer_from_state
from distprune.forward import LayerRunner

BETAS = (0.9, 0.95)


class TrainableLayer:
    """What trains is in float32, all else in bfloat16 where the run is in bfloat16.

    Args:
        layer: stays as it is; it may have low-rank factors and a calibration branch, which train too.
        index: which layer of the model it is.
        runner: what runs it, and on which device.
        options: what of it trains.
    """

    def __init__(self, layer: DecoderLayer, index: int, runner: LayerRunner, options: DistillConfig):
        self._pruned, self._index, self._runner = layer, index, runner
        # Copied, so that the layer itself stays as it is.
        self._module = runner.build(layer.to(torch.float32, copy=True), index, torch.float32)
        self._module.requires_grad_(options.train == "full")
        if options.train == "lora":
            generator = torch.Generator().manual_seed(options.seed)
            for linear in [module for module in self._module.modules() if isinstance(module, nn.Linear)]:
                update = LowRankUpdate(linear.weight, options.rank, generator)
                parametrize.register_parametrization(linear, "weight", update)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Those that train."""
        return {name: tensor for name, tensor in self._module.named_parameters() if tensor.requires_grad}

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Its output for hidden states in the runner's dtype for gradients, on its device."""
        dtype = self._runner.gradient_dtype
        with torch.autocast(self._runner.device.type, dtype, enabled=dtype != torch.float32):
            return self._runner.forward(self._module, self._index, hidden_states)

    def layer(self) -> DecoderLayer:
        """The layer as it is now in the given one's dtype, low-rank updates folded in; nothing trains after that."""
        for linear in [module for module in self._module.modules() if parametrize.is_parametrized(module)]:
            parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)
        state = {name: tensor.detach() for name, tensor in self._module.state_dict().items()}
        return layer_from_state(state, self._pruned.shape).to(self._pruned.dtype)


class LowRankUpdate(nn.Module):
    """W -> W + BA (LoRA, Hu et al., ICLR 2022), B zero at the start."""

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator):
        super().__init__()
        out_features, in_features = weight.shape
        rank = min(rank, *weight.shape)
        start = torch.randn(rank, in_features, generator=generator) / math.sqrt(in_features)
        self.right = nn.Parameter(start.to(weight))
        self.left = nn.Parameter(weight.new_zeros(out_features, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.left @ self.right
