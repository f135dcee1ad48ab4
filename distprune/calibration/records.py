"""What of a record (a JSON object, a row of a table) is its document."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping

from distprune.calibration.chat import CHATS, SYSTEM, TOOLS, Conversation, conversation
from distprune.errors import InputError

_TEXT = "text"
_INSTRUCTION = ("instruction", "output")
_INSTRUCTION_INPUT = "input"

# The prompts that Stanford Alpaca was trained with.
_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
_PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


def document_fields(present: Collection[str], field: str | None, where: str) -> tuple[str, ...]:
    """The fields that a record's document is made of, the first of which holds its text or its messages.

    That is the user's choice; else "text", the messages of a conversation, or Alpaca's instruction, input and output.

    `present`: the record's fields; `field`: the user's choice; `where`: how an error names the record. Raises
    InputError that lists the fields present.
    """
    chosen = next((name for name in ([field] if field else (_TEXT, *CHATS)) if name in present), None)
    if chosen == _TEXT:
        return (chosen,)
    if chosen is not None:  # what a field of the user's choice holds, its values tell
        return (chosen, *(name for name in (SYSTEM, TOOLS) if name in present and name != chosen))
    if field is None and all(name in present for name in _INSTRUCTION):
        return (*_INSTRUCTION, *(name for name in (_INSTRUCTION_INPUT,) if name in present))
    others = f", nor 'instruction' and 'output', nor {' or '.join(map(repr, CHATS[:2]))}"
    wanted = f"no field {field or _TEXT!r}" + ("" if field else others)
    raise InputError(f"{where}: {wanted}. The fields are {', '.join(present) or 'none'}; choose one with --field.")


def is_instruction(fields: tuple[str, ...]) -> bool:
    """Whether `document_fields` found an instruction, whose document should be read from its start."""
    return fields[: len(_INSTRUCTION)] == _INSTRUCTION


def document(record: Mapping[str, object], fields: tuple[str, ...], where: str) -> str | Conversation:
    """The document of one record; empty where its fields are null.

    Raises InputError when they hold neither text nor messages.
    """
    if is_instruction(fields):
        return _instruction({name: _text(record[name], name, where) for name in fields})
    name, value = fields[0], record[fields[0]]
    if name in CHATS and isinstance(value, str) and value.lstrip().startswith("["):
        value = _parsed(value, name, where)
    if isinstance(value, list) and (name in CHATS or isinstance(next(iter(value), None), Mapping)):
        return conversation(value, record, where) if value else ""
    return _text(value, name, where)


def _parsed(messages: str, name: str, where: str) -> object:
    """The messages that a table keeps as JSON in a string."""
    try:
        return json.loads(messages)
    except ValueError as error:
        raise InputError(f"{where}: field {name!r} holds a list that is not valid JSON ({error}); fix it.") from error


def _text(value: object, name: str, where: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"{where}: field {name!r} holds {type(value).__name__}, not text; choose another.")
    return value


def _instruction(values: Mapping[str, str]) -> str:
    prompt = _PROMPT_WITH_INPUT if values.get(_INSTRUCTION_INPUT) else _PROMPT
    return prompt.format_map(values) + values["output"]
