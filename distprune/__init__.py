"""distprune: distributed, offline structured pruning of large language models on Ray."""

from typing import TYPE_CHECKING, Any

from distprune.api import (
    calibrate,
    card,
    compare,
    evaluate,
    inspect,
    measure_latency,
    plan,
    plan_from,
    prune,
    report,
    status,
)
from distprune.errors import InputError, RunFailed
from distprune.transformers_warnings import without_per_layer_warning
from distprune.version import __version__

if TYPE_CHECKING:
    from distprune.config import PruneConfig
    from distprune.engine import RunRecord, suggested_name
    from distprune.modeling import load

__all__ = [
    "InputError",
    "PruneConfig",
    "RunFailed",
    "RunRecord",
    "__version__",
    "calibrate",
    "card",
    "compare",
    "evaluate",
    "inspect",
    "load",
    "measure_latency",
    "plan",
    "plan_from",
    "prune",
    "report",
    "status",
    "suggested_name",
]

without_per_layer_warning()

if not TYPE_CHECKING:  # type checkers would take any name for one that is there

    def __getattr__(name: str) -> Any:
        """What is imported when it is asked for: torch, Ray and pydantic would hold up ``distprune --help``."""
        if name == "PruneConfig":
            from distprune.config import PruneConfig

            return PruneConfig
        if name == "load":
            from distprune.modeling import load

            return load
        if name == "RunRecord":
            from distprune.engine import RunRecord

            return RunRecord
        if name == "suggested_name":
            from distprune.engine import suggested_name

            return suggested_name
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
