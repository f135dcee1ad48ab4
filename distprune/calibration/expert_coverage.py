"""Calibration windows chosen so that every expert of a mixture sees enough tokens.

Experts that text seldom reaches are known by few tokens, and rare ones by none. So more windows are looked at than are
asked for, and those are added that reach the experts which still lack tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distprune.calibration.whole_model import input_device
from distprune.errors import InputError
from distprune.layers.expert_names import EXPERTS, find_experts

#: Tokens that every expert is to see, and how many times the windows asked for are looked at.
ENOUGH, CANDIDATES = 100, 8


@dataclass(frozen=True)
class Coverage:
    """The tokens that each expert sees in the windows that were chosen.

    Attributes:
        tokens: by the name of a mixture in the model, of each expert, (E,).
        added: how many windows there are beyond those asked for.
    """

    tokens: dict[str, np.ndarray]
    added: int

    def __str__(self) -> str:
        lacking = {name: int((tokens < ENOUGH).sum()) for name, tokens in self.tokens.items()}
        experts = sum(map(len, self.tokens.values()))
        told = f"{self.added} windows were added for experts that the others seldom reach. "
        if not sum(lacking.values()):
            return told + f"All {experts} experts see {ENOUGH} tokens or more."
        named = ", ".join(f"{count} in {name}" for name, count in lacking.items() if count)
        return told + f"Still fewer than {ENOUGH} tokens reach {sum(lacking.values())} of {experts} experts: {named}."


def choose_covering(
    model: PreTrainedModel,
    windows: np.ndarray,
    count: int,
    batch_size: int = 8,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[np.ndarray, Coverage]:
    """The first ``count`` of the windows, and what others it takes for every expert to see :data:`ENOUGH` tokens.

    Args:
        model: a mixture of experts.
        windows: token ids to choose from, (n, length) with n >= count.
        count: windows that are chosen in any case.
        batch_size: windows in one forward pass.
        on_progress: called with the tokens that were passed through the model, and with those in all.

    Raises:
        InputError: the model has no mixtures of experts that are known.
    """
    names = mixtures(model)
    if not names:
        raise InputError(
            f"--cover-experts: a {model.config.model_type} model has no experts that distprune knows. Leave it out."
        )
    passed = []
    for start in range(0, len(windows), batch_size):
        passed.append(routed_tokens(model, names, windows[start : start + batch_size]))
        if on_progress:
            on_progress(min(start + batch_size, len(windows)) * windows.shape[1], windows.size)
    tokens = np.concatenate(passed)
    chosen = covering(tokens, count)
    sizes = [model.get_submodule(name).get_submodule(EXPERTS).num_experts for name in names]
    seen = np.split(tokens[chosen].sum(axis=0), np.cumsum(sizes)[:-1])
    return windows[chosen], Coverage(dict(zip(names, seen, strict=True)), len(chosen) - count)


def covering(tokens: np.ndarray, count: int) -> list[int]:
    """The first ``count`` windows, and then, one after the other, those that give most of what experts lack.

    Args:
        tokens: of each window and each expert, (n, experts).
    """
    chosen, left = list(range(count)), list(range(count, len(tokens)))
    lacking = ENOUGH - tokens[:count].sum(axis=0)
    while left and (lacking > 0).any():
        gains = np.minimum(tokens[left], lacking.clip(min=0)).sum(axis=1)
        if not gains.any():
            break
        best = left.pop(int(gains.argmax()))
        chosen.append(best)
        lacking = lacking - tokens[best]
    return chosen


def mixtures(model: PreTrainedModel) -> list[str]:
    """The names of the model's mixtures of experts."""
    return [name for name, module in model.named_modules() if find_experts(module) is not None]


@torch.inference_mode()
def routed_tokens(model: PreTrainedModel, names: list[str], windows: np.ndarray) -> np.ndarray:
    """How many tokens of each window go to each expert of each mixture, (n, experts)."""
    counts: list[Tensor] = []
    ids = torch.from_numpy(np.ascontiguousarray(windows, dtype=np.int64)).to(input_device(model))
    with counting(model, names, len(windows), counts):
        model.get_decoder()(input_ids=ids, use_cache=False)
    return torch.cat(counts, dim=1).numpy()


@contextmanager
def counting(model: PreTrainedModel, names: list[str], windows: int, counts: list[Tensor]) -> Iterator[None]:
    def count(experts: nn.Module, given: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        _, chosen, _ = (*given, *named.values())
        numbers = chosen.reshape(windows, -1).long().cpu()
        ones = torch.ones_like(numbers)
        counts.append(torch.zeros(windows, experts.num_experts, dtype=torch.long).scatter_add_(1, numbers, ones))

    modules = [model.get_submodule(name).get_submodule(EXPERTS) for name in names]
    handles = [module.register_forward_pre_hook(count, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
