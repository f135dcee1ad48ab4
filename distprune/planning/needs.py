"""What one worker needs of the machine that it is put on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from distprune.checkpoint import Checkpoint
from distprune.config import PruneConfig
from distprune.planning.cluster import Cluster
from distprune.planning.memory import CUDA_CONTEXT, FRAGMENTATION, plan_memory
from distprune.planning.scenario import make_scenario


def worker_needs(config: PruneConfig, checkpoint: Checkpoint, device: str) -> tuple[int, int]:
    """Bytes of a GPU, CUDA's own included (0 on the CPU), and of memory that a worker shares with no other process.

    Drawing the model's own samples is left out: one worker does it, once, and spreads what is too large for it.

    Raises:
        InputError: the input is unusable; names it and the mend.
    """
    on_gpu = device == "cuda"
    alone = config.model_copy(update={"device": device, "workers": 1, "gpus_per_worker": None})
    scenario = make_scenario(alone, checkpoint, Cluster(gpus=int(on_gpu)), "h100" if on_gpu else "cpu", {})
    given = alone.model_copy(update={"calibration": Path("calibration.arrow")})
    memory = plan_memory(replace(scenario, config=given))
    device = round(FRAGMENTATION * memory.worker_device) + CUDA_CONTEXT if on_gpu else 0
    return device, memory.worker_resident - memory.store
