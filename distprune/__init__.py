"""distprune: distributed, offline structured pruning of large language models on Ray.

Importing it lets transformers' Auto classes open pruned checkpoints without ``trust_remote_code``.
"""

from distprune.api import calibrate, compare, evaluate, inspect, plan, prune, status
from distprune.errors import InputError, RunFailed
from distprune.version import __version__

__all__ = [
    "InputError",
    "RunFailed",
    "__version__",
    "calibrate",
    "compare",
    "evaluate",
    "inspect",
    "plan",
    "prune",
    "status",
]
