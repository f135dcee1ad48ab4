"""What a worker does, in words for people who don't know the names of tasks."""

from __future__ import annotations

from distprune.engine.telemetry.progress import Assignment

# Where a task's own name says too little.
WORDS = {
    "check_layer": "check weights",
    "check_outer": "check embedding and head",
    "prove_layer": "check layer code",
    "open_forward": "read weights",
    "sweep": "forward",
    "close_layer": "finish statistics",
    "open_loss": "read head",
    "loss_gradient": "loss and gradient",
    "close_loss": "loss",
    "open_backward": "read weights",
    "open_dense": "read weights",
    "open_student": "read weights",
    "leave": "end pass",
    "open_end": "read head",
    "diverge": "loss and gradient",
    "close_end": "loss",
    "learn": "backward",
    "step_optimizer": "optimizer step",
    "fold_in": "fold in updates",
    "merge": "merge shards",
}


def in_words(assignment: Assignment) -> str:
    """Such as "finish statistics, layer 22"."""
    words = WORDS.get(assignment.method, assignment.method.replace("_", " "))
    return words if assignment.layer is None else f"{words}, layer {assignment.layer}"
