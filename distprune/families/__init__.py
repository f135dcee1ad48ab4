"""Model families: tables of the names in the module trees of their decoder layers."""

from distprune.families.family import Family, Fused
from distprune.families.tables import TABLES, family_of

__all__ = ["TABLES", "Family", "Fused", "family_of"]
