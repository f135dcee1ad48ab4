"""The seconds that variations of one layer take, all measured in turn.

Every round goes through all of them in an order of its own, so that a machine that is slow for a while is so for all.
What a server's caches hold when it comes to a layer is not that layer's weights but those of the layers before it: so
every variation has weights of its own, which were used a round ago, and before each round the processor's caches are
filled with something else.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from distprune.latency.latency_table import Seconds, Workload
from distprune.layers.architecture import Architecture
from distprune.layers.shapes import LayerShape
from distprune.layers.shell import Call, Shell

#: More bytes than any processor's caches hold.
EVICTING = 256 * 2**20
#: A GPU gets so many calls at a time, as it begins one while it is told the next.
CALLS_ON_GPU = 5

Modules = Mapping[LayerShape, nn.Module]


@dataclass
class Timer:
    """Times variations of one layer of a model.

    Args:
        model: the model.
        index: which of its layers.
        device: where the variations are.
        dtype: of their weights and of hidden states.
        rounds: how often each is timed, after once that does not count.
        advance: called after each round.
    """

    model: Architecture
    index: int
    device: torch.device
    dtype: torch.dtype
    rounds: int
    advance: Callable[[], None] = lambda: None
    shell: Shell = field(init=False)

    def __post_init__(self) -> None:
        self.shell = Shell(self.model, self.device, self.dtype)
        self._evicting = torch.ones(EVICTING // 4, device=self.device)

    @torch.inference_mode()
    def seconds(self, modules: Modules, workloads: Sequence[Workload]) -> dict[LayerShape, Seconds]:
        """The median seconds of each variation, for each of the workloads."""
        by_workload = [self._of_workload(modules, workload) for workload in workloads]
        return {shape: np.array([found[shape] for found in by_workload]) for shape in modules}

    def _of_workload(self, modules: Modules, workload: Workload) -> dict[LayerShape, float]:
        tokens = workload.tokens if workload.kind == "prefill" else 1
        states = torch.randn(workload.batch, tokens, self.model.hidden_size, device=self.device, dtype=self.dtype)
        caches = {shape: self._cache_before(module, workload) for shape, module in modules.items()}
        call, cache = self._call(workload.batch, tokens, self._before(workload))
        rounds, order = [], list(modules)
        for number in range(1 + self.rounds):
            random.Random(number).shuffle(order)
            self._evicting.sum()
            # What is first after that is slow, whatever it is.
            self._timed(modules[order[-1]], states, call, cache, caches[order[-1]])
            rounds.append({s: self._timed(modules[s], states, call, cache, caches[s]) for s in order})
            self.advance()
        return {shape: float(np.median([taken[shape] for taken in rounds[1:]])) for shape in modules}

    def _timed(self, module: nn.Module, states: Tensor, call: Call, cache: Cache, filled: Cache) -> float:
        """The seconds of one call of a module, which finds in its cache what ``filled`` holds."""
        calls = CALLS_ON_GPU if self.device.type == "cuda" else 1
        each = [with_cache(call, cache, copy.deepcopy(filled)) for _ in range(calls)]
        start = self._now()
        for one in each:
            module(states, *one.arguments, **one.keywords)
        return (self._now() - start) / calls

    def _now(self) -> float:
        """Seconds on a clock, once the GPU has done what it was told."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    # ---------------------------------------------------------------- caches

    def _before(self, workload: Workload) -> int:
        """The tokens of each sequence that the cache holds."""
        return workload.tokens if workload.kind == "decode" else 0

    def _cache_before(self, module: nn.Module, workload: Workload) -> Cache:
        """What the module has cached when the workload begins, by itself."""
        if not (before := self._before(workload)):
            return self._empty_cache()
        states = torch.randn(workload.batch, before, self.model.hidden_size, device=self.device, dtype=self.dtype)
        call, cache = self._call(workload.batch, before, 0)
        call = with_cache(call, cache, filled := self._empty_cache())
        module(states, *call.arguments, **call.keywords)
        return filled

    def _call(self, batch: int, tokens: int, before: int) -> tuple[Call, Cache]:
        """What the model calls the layer with for tokens that follow others, and the cache that is among it."""
        cache = self._empty_cache()
        for index in range(self.model.num_layers) if before else ():
            # Narrow, as nothing is computed with it: the model only asks how many tokens were seen.
            seen = torch.zeros(batch, 1, before, 1, device=self.device, dtype=self.dtype)
            cache.update(seen, seen, index)
        return self.shell.calls_with_cache(batch, tokens, self.dtype, cache)[self.index], cache

    def _empty_cache(self) -> DynamicCache:
        return DynamicCache(config=self.model.config)


def with_cache(call: Call, cache: Cache, other: Cache) -> Call:
    """The call with another cache in the place of the one that it has."""
    return Call(call.arguments, {name: other if value is cache else value for name, value in call.keywords.items()})
