"""The dtypes that transformers loads tensors in: some families keep a router's tensors in float32 in every model."""

from __future__ import annotations

import re
from functools import lru_cache

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import build_glob_alternation


def loaded_dtype(model: PreTrainedModel, name: str, dtype: torch.dtype) -> torch.dtype:
    """What a tensor of a model is in, by its name in the model's state dict, where the model is loaded in ``dtype``."""
    kept = model._get_dtype_plan(dtype)
    return torch.float32 if kept and _pattern(tuple(sorted(kept))).search(name) else dtype


@lru_cache
def _pattern(names: tuple[str, ...]) -> re.Pattern[str]:
    return build_glob_alternation([*names])[0]
