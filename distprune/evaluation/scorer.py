"""A model that is asked for losses, log-likelihoods and generated text, batch by batch."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distprune.calibration.whole_model import load_model
from distprune.evaluation.answering import Answering, Loading
from distprune.evaluation.perplexity import summed_loss
from distprune.hardware import name_of

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM


class Scorer:
    """A model in this process. Its weights are read when it is first asked something."""

    def __init__(self, folder: Path, loading: Loading):
        self._folder, self._loading = folder, loading

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model, ready for inference. Raises InputError when it can't be loaded."""
        return load_model(self._folder, self._loading.device, self._loading.dtype, self._loading.trust_remote_code)

    @cached_property
    def _harness_model(self) -> HFLM:
        from distprune.evaluation.harness import harness_model

        return harness_model(self.model, self._folder, self._loading)

    def dtype(self) -> str:
        """The dtype that it computes in."""
        return name_of(self.model.dtype)

    def ask(self, question: str, batches: Sequence[Any]) -> list[Any]:
        """The answers to one of the questions below, in the order of the batches."""
        return [getattr(self, question)(batch) for batch in batches]

    def loss(self, windows: Tensor) -> float:
        """See :func:`distprune.evaluation.perplexity.summed_loss`."""
        return summed_loss(self.model, windows)

    def log_likelihoods(self, requests: list[tuple]) -> list[tuple[float, bool]]:
        """See :func:`distprune.evaluation.harness.log_likelihoods`."""
        from distprune.evaluation.harness import log_likelihoods

        return log_likelihoods(self._harness_model, requests)

    def generations(self, requests: list[tuple[str, dict]]) -> list[str]:
        """See :func:`distprune.evaluation.harness.generations`."""
        from distprune.evaluation.harness import generations

        return generations(self._harness_model, requests)


@contextmanager
def scored_here(folder: Path, loading: Loading) -> Iterator[Answering]:
    """A model in this process, whose memory is free again afterwards."""
    yield Scorer(folder, loading)
    gc.collect()  # lm-eval's objects refer to each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
