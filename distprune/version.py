"""The package's version, which is part of what decides a run's bytes."""

__version__ = "0.1.0"
