"""Finding methods by name: those of this package, and those that other distributions bring.

A distribution brings one by an entry point of the group ``distprune.methods``, whose name is the method's::

    [project.entry-points."distprune.methods"]
    by-gradient = "my_package.by_gradient:ByGradient"
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points

from pydantic import ValidationError

from distprune.errors import InputError
from distprune.methods.base import Method

GROUP = "distprune.methods"
OWN = "distprune"
BUILT_IN = {
    "curvature": "distprune.methods.curvature:Curvature",
    "flap": "distprune.methods.flap:Flap",
    "flop": "distprune.methods.flop:Flop",
    "heapr": "distprune.methods.heapr:Heapr",
    "llm-pruner": "distprune.methods.llm_pruner:LLMPruner",
    "magnitude": "distprune.methods.magnitude:Magnitude",
    "mean-router-weight": "distprune.methods.mean_router_weight:MeanRouterWeight",
    "mini-llm": "distprune.methods.mini_llm:MiniLLM",
    "olica": "distprune.methods.olica:Olica",
    "oops": "distprune.methods.oops:Oops",
    "reap": "distprune.methods.reap:Reap",
    "slimgpt": "distprune.methods.slimgpt:SlimGPT",
    "wanda-sp": "distprune.methods.wanda_sp:WandaSp",
    "z-pruner": "distprune.methods.z_pruner:ZPruner",
}


class Methods(UserDict):
    """All methods by name. Each is imported when it is asked for.

    Raises:
        InputError: two distributions bring a method of one name, or one brings something that is no method.
    """

    def __init__(self):
        """Unlike a dict's, its entries are found when one is first asked for."""

    @cached_property
    def data(self) -> dict[str, EntryPoint | type[Method]]:
        found = {name: EntryPoint(name, value, GROUP) for name, value in BUILT_IN.items()}
        for point in entry_points(group=GROUP):
            if origin(point) == OWN or (point.name in found and is_same(point, found[point.name])):
                continue
            if point.name in found:
                raise InputError(
                    f"two packages bring a method called '{point.name}': {origin(found[point.name])} and "
                    f"{origin(point)}. Uninstall one of them, or rename its method."
                )
            found[point.name] = point
        return found

    def __getitem__(self, name: str) -> type[Method]:
        found = self.data[name]
        return load(found) if isinstance(found, EntryPoint) else found


METHODS = Methods()


def load(point: EntryPoint) -> type[Method]:
    """The method that an entry point names.

    Raises:
        InputError: it can't be imported, or is none.
    """
    try:
        method = point.load()
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"method '{point.name}' of the package {origin(point)}: {point.value} can't be imported ({error}). Install "
            "what it needs, or uninstall the package."
        ) from error
    if not (isinstance(method, type) and issubclass(method, Method) and method.name == point.name):
        raise InputError(
            f"method '{point.name}' of the package {origin(point)}: {point.value} is no distprune.methods.Method of "
            "that name. Correct the package's entry point, or uninstall it."
        )
    return method


def origin(point: EntryPoint) -> str:
    """The distribution that brings an entry point."""
    return point.dist.name if point.dist else OWN


def is_same(point: EntryPoint, other: EntryPoint) -> bool:
    """Whether two are one that Python finds twice, such as in a checkout and in its installation."""
    return (origin(point), point.value) == (origin(other), other.value)


def make_method(name: str, options: Mapping[str, object]) -> Method:
    """The method called ``name`` with the given hyperparameters, the others at their defaults.

    Raises:
        InputError: no such method, no such hyperparameter, or a value out of range.
    """
    if name not in METHODS:
        raise InputError(f"method '{name}' does not exist. Choose one of: {', '.join(sorted(METHODS))}.")
    method = METHODS[name]
    try:
        return method(**options)
    except ValidationError as error:
        problem = error.errors()[0]
        option = ".".join(map(str, problem["loc"]))
        known = ", ".join(method.model_fields)
        raise InputError(f"option '{option}' of method {name}: {problem['msg']}. It has: {known}.") from None
