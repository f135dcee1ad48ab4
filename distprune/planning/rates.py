"""How fast hardware is, in one small table: effective rates, not peaks. Every one can be overridden."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from distprune.errors import InputError


@dataclass(frozen=True)
class Rates:
    """Of one worker: one GPU, or some threads of a CPU. Operations or bytes a second, and seconds where it says so."""

    half: float  # FLOP/s of products of 16-bit numbers
    float32: float  # FLOP/s of products and factorizations in float32
    float64: float  # FLOP/s of the same in float64
    eigen: float  # FLOP/s of decompositions into eigenvectors, at 9n³ each
    memory: float  # bytes/s of passes over arrays
    launch: float  # seconds that the smallest kernel takes
    link: float  # bytes/s from a host's ordinary memory to its GPU
    locked: float  # bytes/s from a GPU to its host's page-locked memory
    store: float  # bytes/s through Ray's object store, on one node
    network: float  # bytes/s between nodes
    read: float  # bytes/s from the checkpoint, for each node
    write: float  # bytes/s to the output's disk
    call_seconds: float  # what a task costs besides its work
    start_seconds: float  # until Ray and the workers are up


#: Those of an H100 were measured (scripts/gpu_check.sh, on an H200, which computes as fast); an A100's were not. A
#: CPU's are of one thread.
RATES = {
    "h100": Rates(6e14, 2.8e13, 2e13, 4.8e12, 2e12, 1e-5, 1e10, 5e10, 1e10, 2e9, 2e9, 1e9, 0.01, 40),
    "a100": Rates(2e14, 1.5e13, 1e13, 2e12, 1e12, 1e-5, 1e10, 2.5e10, 1e10, 2e9, 2e9, 1e9, 0.01, 40),
    "cpu": Rates(3.2e11, 1.2e11, 6e10, 5e10, 8e9, 2e-6, 1e10, 1e10, 5e9, 2e9, 1e9, 5e8, 0.02, 10),
}
#: Those that grow with a worker's threads.
OF_THREADS = ("half", "float32", "float64", "eigen", "memory")


def rates_of(hardware: str, threads: int, overrides: Mapping[str, float]) -> Rates:
    """The rates of a worker on ``hardware``; ``threads`` counts on CPUs alone. An override is of the whole worker.

    Raises:
        InputError: no such hardware, no such rate, or one that is not positive.
    """
    if hardware not in RATES:
        raise InputError(f"hardware '{hardware}' is not known. Choose one of: {', '.join(RATES)}; override its rates.")
    overrides = {name: _positive(name, value) for name, value in overrides.items()}
    rates = RATES[hardware]
    if hardware == "cpu":
        rates = replace(rates, **{name: threads * getattr(rates, name) for name in OF_THREADS})
    return replace(rates, **overrides)


def _positive(name: str, value: object) -> float:
    names = [field.name for field in fields(Rates)]
    try:
        number = float(value)  # YAML takes 3e9 for a word
    except (TypeError, ValueError):
        number = 0.0
    if name not in names or not number > 0:
        raise InputError(f"rate '{name}' = {value!r}: give a positive number for one of: {', '.join(names)}.")
    return number
