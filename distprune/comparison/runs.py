"""The runs of a comparison: every method at every sparsity, and what is common to all."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from distprune.config import PruneConfig, load_config
from distprune.errors import InputError

#: Fields of a configuration by name, and hyperparameters by method and name.
Settings = Mapping[str, Any]
MethodOptions = Mapping[str, Mapping[str, Any]]

# What a comparison sets for each run, and by which of its options.
PER_RUN = {
    "method": "--methods",
    "options": "--option METHOD.NAME=VALUE",
    "output": "--keep",
    "push_to_hub": "--keep",
    "sparsity": "--sparsity",
}
# What the name of a method ends in where a run is to be distilled.
DISTILLED = "+distill"


@dataclass(frozen=True)
class Run:
    """One combination: what ``--methods`` calls its method, and what to run."""

    name: str
    config: PruneConfig

    @property
    def title(self) -> str:
        return f"{self.name} at {percent(self.config.sparsity)}%"


def list_runs(
    methods: Sequence[str],
    sparsities: Sequence[float],
    common: Settings,
    config_file: Path | None,
    options: MethodOptions,
    folder: Path,
) -> list[Run]:
    """All combinations, by method and then by sparsity, with outputs in ``folder``.

    Raises:
        InputError: there is none or one twice, an option is unusable, or one is given for what it can't be.
    """
    refuse_per_run(common, "a comparison")
    refuse_unused(options, methods)
    runs = []
    for name in methods:
        fields = fields_of(name, common)
        for sparsity in sparsities:
            output = folder / f"{name}-{percent(sparsity)}"
            own = {"sparsity": sparsity, "output": output, "options": options.get(fields["method"], {})}
            runs.append(Run(name, load_config(config_file, {**common, **fields, **own})))
    if not runs:
        raise InputError("--methods, --sparsity: give at least one of each.")
    if config_file is not None:
        refuse_per_run(yaml.safe_load(config_file.read_text(encoding="utf-8")), str(config_file))
    refuse_repeated([run.title for run in runs])
    return runs


def fields_of(name: str, common: Settings) -> dict[str, Any]:
    """The fields of :class:`PruneConfig` that a name in ``--methods`` stands for.

    Distillation's options may be common to all runs, but only the runs of a name with the suffix are distilled.
    """
    distilled = name.endswith(DISTILLED)
    return {"method": name.removesuffix(DISTILLED), "distill": common.get("distill", {}) if distilled else False}


def percent(fraction: float) -> str:
    return f"{100 * fraction:g}"


def refuse_per_run(settings: Collection[str], origin: str) -> None:
    for name, option in PER_RUN.items():
        if name in settings:
            raise InputError(f"{origin}: '{name}' can't be common to all runs; leave it out and give {option}.")


def refuse_unused(options: MethodOptions, methods: Sequence[str]) -> None:
    compared = {name.removesuffix(DISTILLED) for name in methods}
    for method, values in options.items():
        if method not in compared:
            raise InputError(f"--option {method}.{next(iter(values), '')}: '{method}' is not among --methods.")


def refuse_repeated(titles: Sequence[str]) -> None:
    for title in titles:
        if titles.count(title) > 1:
            raise InputError(f"--methods, --sparsity: {title} is asked for twice.")


@contextmanager
def naming(title: str) -> Iterator[None]:
    """Errors inside say what they are of."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{title}: {error}") from None
    except Exception as error:
        raise RuntimeError(f"{title} failed") from error
