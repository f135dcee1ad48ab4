"""Whether a run's calibration set is large enough for a plan that predicts the loss."""

from __future__ import annotations

from distprune.methods import Plan


def too_few_tokens(plan: Plan, tokens: int, hidden_size: int) -> list[str]:
    """What to tell people whose calibration set has fewer tokens than a hidden state has numbers; else nothing.

    Second moments of so few tokens are singular: along the directions that no token has, removing anything seems free.
    """
    if plan.predicted_loss is None or tokens >= hidden_size:
        return []
    return [
        f"The calibration set has {tokens:,} tokens, and the model's hidden size is {hidden_size:,}: with fewer tokens "
        "than that, what is removed seems to cost nothing, so the plan and its predicted loss mean little. Calibrate "
        f"on at least {hidden_size:,} tokens, better on many times as many: raise --samples or --sequence-length."
    ]
