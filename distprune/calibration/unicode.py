"""Text that tokenizers take: lone surrogates, which JSON can spell and UTF-8 can't, are replaced."""

from __future__ import annotations

from typing import TypeVar

Value = TypeVar("Value")


def without_surrogates(value: Value) -> Value:
    """A text, or the lists and mappings of texts that JSON gives, in which every lone surrogate is U+FFFD.

    Two surrogates that make a pair become the character that they spell. What holds none is returned as it is.
    """
    if isinstance(value, str):
        return value if _is_encodable(value) else _replaced(value)
    if isinstance(value, list):
        return [without_surrogates(element) for element in value]
    if isinstance(value, dict):
        return {without_surrogates(name): without_surrogates(element) for name, element in value.items()}
    return value


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _replaced(text: str) -> str:
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
