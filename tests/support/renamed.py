"""What versions of transformers call by different names."""

from __future__ import annotations

from transformers import PreTrainedModel


def enable_checkpointing(model: PreTrainedModel, options: dict) -> None:
    """Let the model compute activations again in its backward pass; renamed in 5.24."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)
