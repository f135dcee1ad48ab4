"""Pruning methods, one file each."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import ValidationError

from distprune.errors import InputError
from distprune.methods.base import Method, Plan, Profile
from distprune.methods.curvature import Curvature
from distprune.methods.flap import Flap
from distprune.methods.llm_pruner import LLMPruner
from distprune.methods.magnitude import Magnitude
from distprune.methods.olica import Olica
from distprune.methods.oops import Oops
from distprune.methods.slimgpt import SlimGPT
from distprune.methods.wanda_sp import WandaSp

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (Curvature, Flap, LLMPruner, Magnitude, Olica, Oops, SlimGPT, WandaSp)
}


def make_method(name: str, options: Mapping[str, object]) -> Method:
    """The method called ``name`` with the given hyperparameters, the others at their defaults.

    Raises:
        InputError: no such method, no such hyperparameter, or a value out of range.
    """
    if name not in METHODS:
        raise InputError(f"method '{name}' does not exist. Choose one of: {', '.join(sorted(METHODS))}.")
    try:
        return METHODS[name](**options)
    except ValidationError as error:
        problem = error.errors()[0]
        option = ".".join(map(str, problem["loc"]))
        known = ", ".join(METHODS[name].model_fields)
        raise InputError(f"option '{option}' of method {name}: {problem['msg']}. It has: {known}.") from None


__all__ = ["METHODS", "Method", "Plan", "Profile", "make_method"]
