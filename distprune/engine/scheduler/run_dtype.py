"""The dtype of a run's forward passes: one for all workers, whichever nodes they are on or come to be on.

The driver settles it by the nodes that are there when the run starts, and tells its workers.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import ray
import torch
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from distprune.config import PruneConfig
from distprune.engine.scheduler.ray_cluster import WorkerPlan, nodes_with_room
from distprune.hardware import AUTO, ComputeDtype, compute_dtype

#: Seconds after which a node that has not answered is no longer waited for.
PATIENCE = 60


def settle_dtype(config: PruneConfig, stored: torch.dtype, workers: WorkerPlan) -> ComputeDtype:
    """The dtype asked for; or for "auto" the checkpoint's, if the workers' devices on every node have units for it.

    A worker that joins later computes in the same dtype, whatever its hardware.

    Args:
        config: the run.
        stored: the dtype of the checkpoint's weights.
        workers: those that the nodes are to have.
    """
    if config.dtype != AUTO:
        return ComputeDtype(getattr(torch, config.dtype), "as --dtype asks")
    nodes = nodes_with_room(workers) if stored.itemsize == 2 else []
    # Where no node can answer, for there is none yet, this machine does.
    answers = ask_nodes(nodes, stored, workers.device) or [compute_dtype(stored, workers.device)]
    return next((answer for answer in answers if answer.dtype != stored), answers[0])


def ask_nodes(nodes: Sequence[str], stored: torch.dtype, device: str) -> list[ComputeDtype]:
    """What each of the nodes, by Ray's ids, computes in at speed; of those that answer."""
    answers, asked = [], []
    for node in nodes:
        here = node == ray.get_runtime_context().get_node_id()
        if here and (device == "cpu" or torch.cuda.is_available()):
            answers.append(compute_dtype(stored, device))  # a process of its own would take seconds to find out
        else:
            there = NodeAffinitySchedulingStrategy(node, soft=False)
            asked.append(compute_dtype_there.options(scheduling_strategy=there).remote(stored, device))
    answered, _ = ray.wait(asked, num_returns=len(asked), timeout=PATIENCE) if asked else ([], [])
    for answer in asked:
        if answer in answered:
            try:
                answers.append(ray.get(answer))
            except RayError:  # the node is lost, or of no use to a worker either, which can say why
                continue
    return answers


@ray.remote(num_cpus=0, max_calls=1)
def compute_dtype_there(stored: torch.dtype, device: str) -> ComputeDtype:
    """What the node that this runs on computes in at speed. Takes up nothing that a worker is waiting for."""
    # Older versions of Ray hide all GPUs from what asks for none.
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        del os.environ["CUDA_VISIBLE_DEVICES"]
    return compute_dtype(stored, device)
