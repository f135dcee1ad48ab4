"""The model card of a pruned checkpoint: README.md, with metadata as the Hugging Face hub reads them."""

from distprune.engine.run.model_card.card import write_card
from distprune.engine.run.model_card.checkpoint_name import suggested_name

__all__ = ["suggested_name", "write_card"]
