"""What pruned checkpoints carry: small modules that stand in for others, and classes that build models with them."""

from distprune.modeling.cache_name import CACHE
from distprune.modeling.loading import load

__all__ = ["CACHE", "load"]
