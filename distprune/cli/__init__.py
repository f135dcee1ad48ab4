"""The command line. Each command is the file of its name: ``distprune prune`` is in ``prune_command.py``."""

from distprune.cli.application import app, main

__all__ = ["app", "main"]
