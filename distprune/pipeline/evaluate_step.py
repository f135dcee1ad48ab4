"""The step that measures one model, dense or pruned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distprune.pipeline.contents import digest_of_folder, digest_of_text
from distprune.pipeline.measuring import measure
from distprune.pipeline.settings import EvaluateConfig
from distprune.pipeline.step import Step, Surroundings


@dataclass(frozen=True)
class Evaluate(Step):
    """Measures the model in the folder that ``find`` gives, which may have to be fetched first."""

    name: str
    find: Callable[[], Path]
    settings: EvaluateConfig
    inputs: Mapping[str, Any]

    def run(self, surroundings: Surroundings) -> dict[str, Any]:
        base, bar = surroundings.base, surroundings.progress()
        if self.settings.workers:
            surroundings.connect()
        with bar:
            bar.stage("Evaluating", 1)
            measured = measure(self.find().absolute(), self.settings, base.address, base.trust_remote_code)
            bar.advance()
        return asdict(measured)

    def is_there(self, result: Mapping[str, Any]) -> bool:
        return True  # the result is all there is


def plan_evaluation(name: str, find: Callable[[], Path], made_by: str, settings: EvaluateConfig) -> Evaluate:
    """The step. ``made_by``: what decides the model, a fingerprint or an identity.

    Raises:
        InputError: the text or the folder of tasks does not exist.
    """
    inputs = {"model": made_by, **settings.model_dump(mode="json", exclude={"text", "include_path", "workers"})}
    inputs["text"] = settings.text and digest_of_text(settings.text)
    inputs["tasks' definitions"] = settings.include_path and digest_of_folder(settings.include_path)
    return Evaluate(name, find, settings, inputs)
