"""The model that a pipeline starts from, settled to one commit or one content."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from distprune.checkpoint import Checkpoint, HubModel
from distprune.config import PruneConfig
from distprune.engine.run.preflight import open_model


@dataclass(frozen=True)
class SettledModel:
    """A model as it is now.

    Attributes:
        identity: what it is known by: repository and commit, or a digest of its content.
        commit: of a hub model; runs are given it in place of the branch.
        checkpoint: its headers.
        folder: its configuration and tokenizer, and of a local model its weights.
    """

    identity: str
    commit: str | None
    checkpoint: Checkpoint
    hub: HubModel | None

    @property
    def folder(self) -> Path:
        return self.checkpoint.path

    def whole_folder(self) -> Path:
        """The model's folder with its weights, which those of a model elsewhere are fetched into."""
        return self.hub.fetch_all() if self.hub else self.checkpoint.whole_folder()


def settle(config: PruneConfig) -> SettledModel:
    """Find out which commit a branch points to, or what a folder holds, from headers alone.

    Raises:
        InputError: there is no such model.
    """
    hub, checkpoint = open_model(config)
    if hub:
        return SettledModel(f"{hub.repository}@{hub.commit}", hub.commit, checkpoint, hub)
    return SettledModel(checkpoint.fingerprint(), None, checkpoint, None)
