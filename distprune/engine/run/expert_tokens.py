"""How many calibration tokens each expert of a mixture has seen."""

from __future__ import annotations

from collections.abc import Sequence

from distprune.engine.worker.open_layers import EXPERT_TOKENS
from distprune.methods import Profile

#: Of fewer tokens an expert's statistics say little.
ENOUGH = 100


def tokens_by_layer(profiles: Sequence[Profile]) -> list[list[int] | None]:
    """Of each layer the tokens of its experts; None where it has none."""
    return [profile[EXPERT_TOKENS].tolist() if EXPERT_TOKENS in profile else None for profile in profiles]


def seldom_used(tokens: Sequence[Sequence[int] | None]) -> list[str]:
    """What to tell people of experts that have seen few tokens; nothing where all have seen enough."""
    few = {
        index: sum(seen < ENOUGH for seen in of_layer) for index, of_layer in enumerate(tokens) if of_layer is not None
    }
    if not sum(few.values()):
        return []
    everyone = sum(len(of_layer) for of_layer in tokens if of_layer is not None)
    worst = max(few, key=lambda index: few[index])
    return [
        f"{sum(few.values())} of {everyone} experts have seen fewer than {ENOUGH} calibration tokens (most in layer "
        f"{worst}: {few[worst]}), so that little is known of their neurons and they are refitted less. Calibrate on "
        "more text, or let distprune calibrate --cover-experts choose it."
    ]
