"""What of a record (a JSON object, a row of a table) is its document."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from distprune.errors import InputError

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
    """The fields that a record's document is made of: one that holds text, or those of an instruction.

    `present`: the record's fields; `field`: the user's choice, else "text" or Alpaca's instruction, input
    and output; `where`: how an error names the record. Raises InputError that lists the fields present.
    """
    chosen = field or "text"
    if chosen in present:
        return (chosen,)
    if field is None and all(name in present for name in _INSTRUCTION):
        return (*_INSTRUCTION, *(name for name in (_INSTRUCTION_INPUT,) if name in present))
    wanted = f"no field {chosen!r}" + ("" if field else ", nor 'instruction' and 'output'")
    raise InputError(f"{where}: {wanted}. The fields are {', '.join(present) or 'none'}; choose one with --field.")


def is_instruction(fields: tuple[str, ...]) -> bool:
    """Whether `document_fields` found an instruction, whose document should be read from its start."""
    return len(fields) > 1


def document(record: Mapping[str, object], fields: tuple[str, ...], where: str) -> str:
    """The document of one record; empty where its fields are null. Raises InputError when they hold no text."""
    values = {name: record[name] if record[name] is not None else "" for name in fields}
    for name, value in values.items():
        if not isinstance(value, str):
            raise InputError(f"{where}: field {name!r} holds {type(value).__name__}, not text; choose another.")
    if not is_instruction(fields):
        return values[fields[0]]
    prompt = _PROMPT_WITH_INPUT if values.get(_INSTRUCTION_INPUT) else _PROMPT
    return prompt.format_map(values) + values["output"]
