"""The step that prunes at one sparsity, which resumes inside the run where it was ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distprune.checkpoint import partial_directory
from distprune.config import PruneConfig
from distprune.engine import Requirements, RunRecord, load_record, prune
from distprune.engine.run.journal import IDENTITY, fingerprint
from distprune.engine.run.preflight import check_job
from distprune.engine.run.work_folder import WorkFolder
from distprune.engine.scheduler.ray_cluster import alive_nodes, plan_workers
from distprune.engine.scheduler.run_dtype import settle_dtype
from distprune.errors import InputError
from distprune.pipeline.step import Step, Surroundings
from distprune.planning import worker_needs


@dataclass(frozen=True)
class Prune(Step):
    """Makes one pruned checkpoint, at the configuration's output."""

    name: str
    config: PruneConfig
    inputs: Mapping[str, Any]

    def run(self, surroundings: Surroundings) -> dict[str, Any]:
        surroundings.connect()
        identity = identity_of(self.config)
        work = WorkFolder(partial_directory(self.config.output))
        if not surroundings.restart and self._fingerprint_there() == fingerprint(identity):
            # Made by a pipeline that ended before it could say so, or from other texts that gave the same windows.
            work.remove()
            return result_of(load_record(self.config.output))
        restart = surroundings.restart or not was_begun(work, identity)
        config = self.config.model_copy(update={"restart": restart})
        record = prune(
            config, surroundings.progress(), lambda *job: Requirements(*worker_needs(*job)), surroundings.report
        )
        return result_of(record)

    def is_there(self, result: Mapping[str, Any]) -> bool:
        return self._fingerprint_there() == result["fingerprint"]

    def _fingerprint_there(self) -> str | None:
        """The fingerprint of the run that made what lies at the output."""
        try:
            return load_record(self.config.output).fingerprint
        except InputError:
            return None


def identity_of(config: PruneConfig) -> dict[str, Any]:
    """All that decides the run's bytes on the workers that it would get now."""
    job = check_job(config)
    workers = plan_workers(config, alive_nodes(), job.architecture.num_layers)
    return job.computed_in(settle_dtype(config, job.stored_dtype, workers)).identity(workers.device)


def was_begun(work: WorkFolder, identity: Mapping[str, Any]) -> bool:
    """Whether what an earlier run has left in its work folder is of the run with that identity."""
    return work.journal.has(IDENTITY) and work.journal.report(IDENTITY) == identity


def result_of(record: RunRecord) -> dict[str, Any]:
    return {
        "fingerprint": record.fingerprint,
        "decoder_sparsity": record.decoder_sparsity,
        "total_sparsity": record.total_sparsity,
        "zeroed": record.zeroed,
        "decoder_parameters": record.decoder_parameters_after,
        "total_parameters": record.total_parameters_after,
        "decoder_parameters_dense": record.decoder_parameters_before,
        "total_parameters_dense": record.total_parameters_before,
        "method": record.method,
        "layout": record.layout,
    }
