"""Pruning methods, one file or folder each. A plugin brings more: see `registry.py`."""

from distprune.methods.base import ChangeExperts, CostCurve, LayerToPrune, Method, Observe, Paper, Plan, Profile
from distprune.methods.planning_menus import allocate_menus, costs_by_layer, plan_by_menus
from distprune.methods.registry import METHODS, make_method

__all__ = [
    "METHODS",
    "ChangeExperts",
    "CostCurve",
    "LayerToPrune",
    "Method",
    "Observe",
    "Paper",
    "Plan",
    "Profile",
    "allocate_menus",
    "costs_by_layer",
    "make_method",
    "plan_by_menus",
]
