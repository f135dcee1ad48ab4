"""Turns the text of options into the values that the Python API takes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import yaml

from distprune.errors import InputError


def parse_option(text: str, option: str = "--option") -> tuple[str, Any]:
    """``name=value``, the value read as YAML reads it.

    Raises:
        InputError: it is written in another way.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"{option} {text}: write NAME=VALUE.")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError:
        raise InputError(f"{option} {text}: '{value}' is not a YAML value; quote it as in YAML.") from None


def parse_options(texts: Iterable[str], option: str = "--option") -> dict[str, Any]:
    return dict(parse_option(text, option) for text in texts)


def parse_batches(text: str, option: str) -> tuple[int, ...]:
    """Numbers with commas between them.

    Raises:
        InputError: it is written in another way.
    """
    try:
        return tuple(map(int, text.split(",")))
    except ValueError:
        raise InputError(f"{option} {text}: write numbers of sequences, as in 1,16.") from None


def gather_groups(given: dict[str, Any]) -> None:
    """Replace the options of distillation in ``given`` by one mapping, and those of the search by another.

    Any of them turns distillation, or the search, on.
    """
    for group in ("distill", "search"):
        prefix = f"{group}_"
        options = {name.removeprefix(prefix): given.pop(name) for name in list(given) if name.startswith(prefix)}
        options = {name: value for name, value in options.items() if value is not None}
        if given.get(group) is not False and (options or given.get(group)):
            given[group] = options
