"""The step that makes a calibration set, from texts or from the model's own samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distprune.calibration import build_calibration, open_calibration
from distprune.comparison.comparing import prepare
from distprune.config import PruneConfig
from distprune.engine.run.preflight import check_job
from distprune.engine.scheduler.ray_cluster import alive_nodes, plan_workers
from distprune.errors import InputError
from distprune.pipeline.contents import digest_of_text
from distprune.pipeline.settings import CalibrationConfig
from distprune.pipeline.settled_model import SettledModel
from distprune.pipeline.step import Step, Surroundings


@dataclass(frozen=True)
class Calibrate(Step):
    """Makes one calibration set at ``output``. ``base`` is what all pruning runs have in common."""

    name: str
    output: Path
    settings: CalibrationConfig
    model: SettledModel
    base: PruneConfig
    inputs: Mapping[str, Any]

    def run(self, surroundings: Surroundings) -> dict[str, Any]:
        if self.settings.text:
            self._from_texts()
        else:
            self._from_the_model(surroundings)
        calibration = open_calibration(self.output)
        return {"calibration": calibration.fingerprint, "windows": len(calibration.tokens)}

    def is_there(self, result: Mapping[str, Any]) -> bool:
        try:
            return open_calibration(self.output).fingerprint == result["calibration"]
        except InputError:
            return False

    def _from_texts(self) -> None:
        build_calibration(
            self.model.folder,
            texts=self.settings.text,
            field=self.settings.field,
            samples=self.settings.samples,
            sequence_length=self.settings.sequence_length,
            seed=self.settings.seed,
            output=self.output,
            trust_remote_code=self.base.trust_remote_code,
        )

    def _from_the_model(self, surroundings: Surroundings) -> None:
        """Layer by layer on the workers, as a pruning run without a calibration set does it."""
        surroundings.connect()
        job = check_job(self.own_samples())
        workers = plan_workers(job.config, alive_nodes(), job.architecture.num_layers)
        prepare(job, workers, self.output, surroundings.progress())

    def own_samples(self) -> PruneConfig:
        """A run that would draw the model's own samples."""
        drawn = {name: getattr(self.settings, name) for name in ("samples", "sequence_length", "seed")}
        return self.base.model_copy(update={"output": self.output.with_suffix(""), "sparsity": 0.0, **drawn})


def plan_calibration(
    name: str, output: Path, settings: CalibrationConfig, model: SettledModel, base: PruneConfig
) -> Calibrate:
    """The step, its texts known by what they hold now.

    Raises:
        InputError: a text does not exist.
    """
    inputs: dict[str, Any] = {"model": model.identity, **settings.model_dump(mode="json", exclude={"file", "text"})}
    inputs["text"] = [digest_of_text(text) for text in settings.text]
    if not settings.text:
        inputs |= {"device": base.device, "dtype": base.dtype, "threads per worker": base.threads_per_worker}
    return Calibrate(name, output, settings, model, base, inputs)
