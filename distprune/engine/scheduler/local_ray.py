"""A Ray of the run's own, on this machine."""

from __future__ import annotations

import os
import sys
from datetime import datetime

import ray

from distprune.config import PruneConfig
from distprune.errors import InputError

# The longest name of a Unix socket, in bytes.
LONGEST_SOCKET = 103 if sys.platform == "darwin" else 107
SHORT = "Set RAY_TMPDIR to a short, writable folder such as /tmp."
HOME = "Set HOME to a writable folder: Ray keeps the token of its clusters in ~/.ray."


def start_local_ray(config: PruneConfig, **options: object) -> None:
    """Start one with as many CPUs as the workers ask for, which may be more than there are cores.

    Raises:
        InputError: it can't be started; says what to set where the place of its files is at fault.
    """
    cpus = max(os.cpu_count() or 1, (config.worker_range()[1] or 1) * config.threads_per_worker)
    check_socket_length()
    try:
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, **options)
    except Exception as error:  # Ray's own, the system's, and whatever its parts raise
        raise InputError(f"no Ray can be started on this machine: {explained(error)}") from error


def check_socket_length() -> None:
    """See that Ray's sockets, which lie deep in its temporary folder, can have their names.

    Raises:
        InputError: they can't; names the variable that says where the folder is.
    """
    variables = ("RAY_TMPDIR", "TMPDIR") if sys.platform == "linux" else ("RAY_TMPDIR",)
    variable = next((name for name in variables if name in os.environ), None)
    if variable is None:
        return
    folder = os.environ[variable]
    # As Ray names its sessions.
    socket = f"{folder}/ray/session_{datetime.now():%Y-%m-%d_%H-%M-%S_%f}_{os.getpid()}/sockets/plasma_store"
    excess = len(os.fsencode(socket)) - LONGEST_SOCKET
    if excess > 0:
        raise InputError(
            f"{variable} {folder}: is {excess} bytes too long for the sockets that Ray makes in it. {SHORT}"
        )


def explained(error: Exception) -> str:
    """Why Ray could not be started, and the fix where it is known."""
    if isinstance(error, UnicodeEncodeError):
        return "it is to run in, or with, a path that is not UTF-8. Start it from another folder."
    if isinstance(error, OSError) and error.filename:
        place = os.fsdecode(error.filename)
        return f"{place} can't be made or written ({error.strerror}). {HOME if '.ray' in place else SHORT}"
    reason = str(error).strip().rstrip(".") or type(error).__name__
    return f"{reason}. {HOME}" if "home directory" in reason else f"{reason}."
