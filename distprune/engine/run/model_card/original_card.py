"""What the card of the original says in its metadata, as far as it holds for the pruned model too."""

from __future__ import annotations

from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

#: Fields of the metadata that pruning leaves true.
INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")


def inherited(card: str | None) -> dict[str, Any]:
    """The metadata that a pruned model has from the original.

    Args:
        card: the original's README.md. Without one, or where its metadata are no YAML mapping, there is nothing.
    """
    block = REGEX_YAML_BLOCK.search(card or "")
    try:
        found = yaml.safe_load(block[2]) if block else None
    except yaml.YAMLError:  # a card that the hub would refuse too
        found = None
    return {name: found[name] for name in INHERITED if found.get(name)} if isinstance(found, dict) else {}
