"""A warning of transformers that tells users of pruned checkpoints nothing."""

from __future__ import annotations

import logging

LOGGER = "transformers.integrations.heterogeneity.configuration_utils"
WARNING = "Reading global config value for per-layer attribute"


def without_per_layer_warning() -> None:
    """Keep transformers from warning whenever it reads a configuration whose layers differ, as it reads all fields.

    Pruned checkpoints are made to be read so, and all other warnings still come. It is said when distprune is imported,
    because many parts of it, and of transformers, read configurations.
    """
    logging.getLogger(LOGGER).addFilter(is_another_warning)


def is_another_warning(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(WARNING)
