"""The windows that a search measures on, which nothing is fitted to."""

from __future__ import annotations

import numpy as np

from distprune.calibration import open_calibration
from distprune.config import PruneConfig, SearchConfig
from distprune.errors import InputError

#: Windows that a search holds out unless it is told.
MOST = 32


def split_held_out(config: PruneConfig, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """The calibration set's windows, and those that a search measures on: evenly taken out of them, or a set's own.

    Args:
        config: the run.
        tokens: of its calibration set, (samples, length).

    Returns:
        Both, (samples, length); None for the second without a search.
    """
    search = config.search
    if search is None:
        return tokens, None
    if search.calibration is not None:
        return tokens, open_calibration(search.calibration).tokens
    held_out = np.linspace(0, len(tokens), windows(search, len(tokens)), endpoint=False).astype(int)
    return np.delete(tokens, held_out, axis=0), tokens[held_out]


def check_can_hold_out(config: PruneConfig, samples: int) -> None:
    """See that a search leaves windows to calibrate on.

    Raises:
        InputError: it does not.
    """
    search = config.search
    if search is None or search.calibration is not None:
        return
    if (wanted := windows(search, samples)) >= samples:
        raise InputError(
            f"--search-samples {wanted}: of {samples} windows none would be left to calibrate on. Give fewer, a larger "
            "calibration set, or --search-calibration."
        )


def windows(search: SearchConfig, samples: int) -> int:
    """How many of so many windows a search holds out."""
    return search.samples or max(1, min(MOST, samples // 4))
