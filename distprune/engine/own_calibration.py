"""A calibration set that the model writes itself, on a worker's share of the cluster."""

from __future__ import annotations

from pathlib import Path

import ray
import torch

from distprune.calibration import build_calibration
from distprune.config import PruneConfig
from distprune.engine.cluster import WorkerPlan
from distprune.engine.pool import fetch
from distprune.engine.preflight import Job
from distprune.engine.progress import Progress
from distprune.engine.record import CALIBRATION_FILE


def make_own_calibration(job: Job, workers: WorkerPlan, folder: Path, progress: Progress) -> Path:
    """Sample the model, which is the one step that needs it whole: spread over GPU, host memory and disk if large.

    Returns:
        The Arrow file, in ``folder``: it stays in the result.
    """
    progress.stage("Own samples", 1)
    path = folder.resolve() / CALIBRATION_FILE
    place = sample_model.options(num_cpus=workers.cpus, num_gpus=workers.gpus)
    fetch(place.remote(job.config, job.model_path.resolve(), workers.device, path))
    progress.advance()
    return path


@ray.remote
def sample_model(config: PruneConfig, model_path: Path, device: str, output: Path) -> None:
    # As in the workers: the number of threads may change a rounding, and so a sampled token.
    torch.set_num_threads(config.threads_per_worker)
    build_calibration(
        model_path,
        samples=config.samples,
        sequence_length=config.sequence_length,
        seed=config.seed,
        output=output,
        device=device,
        trust_remote_code=config.trust_remote_code,
    )
