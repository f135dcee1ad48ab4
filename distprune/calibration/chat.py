"""Conversations: how records spell them, and how a tokenizer's chat template writes them out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from transformers import PreTrainedTokenizerBase

from distprune.calibration.unicode import without_surrogates
from distprune.errors import InputError

#: Fields under which records keep the messages of a conversation.
CHATS = ("messages", "conversations", "conversation")
#: Fields that belong to the conversation beside them.
SYSTEM, TOOLS = "system", "tools"

# What ShareGPT calls the speakers whom chat templates know by role.
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "function_response": "tool",
    "observation": "tool",
}
_SPELLINGS = (("role", "content"), ("from", "value"))
# Some templates ask for today's date; calibrated on another day, a model would be pruned to other bytes. So these are
# told of one and the same day. Templates can be given no functions but their own.
_NOW = "strftime_now"
_DATE = "".join(f" | replace('%{code}', '{datetime(2025, 1, 1):%{code}}')" for code in "aAbBdHIjmMpSyY")
_ONE_DAY = f"{{% macro {_NOW}(format) %}}{{{{ format{_DATE} }}}}{{% endmacro %}}\n"


@dataclass(frozen=True)
class Conversation:
    """Messages as chat templates take them, the tools on offer, and what an error calls the conversation."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    where: str


def conversation(messages: Iterable[object], record: Mapping[str, Any], where: str) -> Conversation:
    """The conversation that a record holds, of messages as OpenAI or as ShareGPT spells them.

    A system prompt and tools that stand in fields of their own belong to it. Raises InputError, under `where`, for
    what is no message and for content that is not text.
    """
    messages = [_message(message, f"{where}, message {n}") for n, message in enumerate(messages, 1)]
    system = record.get(SYSTEM)
    if isinstance(system, str) and system and not (messages and messages[0]["role"] == "system"):
        messages.insert(0, {"role": "system", "content": system})
    return Conversation(messages, _tools(record.get(TOOLS), where), where)


def _message(message: object, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InputError(f"{where}: holds {type(message).__name__}, where an object with a role and content is needed.")
    spelled = next((names for names in _SPELLINGS if isinstance(message.get(names[0]), str)), None)
    if spelled is None:
        raise InputError(f"{where}: has neither 'role' and 'content' nor 'from' and 'value'; fix or delete it.")
    role, content = spelled
    # Tables fill in what some messages lack, and templates ask whether it is there at all.
    others = {name: _without_nulls(value) for name, value in message.items() if name not in (role, content)}
    others = {name: value for name, value in others.items() if value is not None}
    if calls := others.get("tool_calls"):
        others["tool_calls"] = [_call(call) for call in calls] if isinstance(calls, list) else calls
    speaker = message[role].lower()
    text = _text(message.get(content), where)
    if text is None and not calls:
        text = ""
    return {"role": _ROLES.get(speaker, speaker), "content": text, **others}


def _text(content: object, where: str) -> str | None:
    """What a message says, of which several parts are joined."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InputError(f"{where}: its content is {type(content).__name__}, not text; fix or delete it.")
    return "".join(_text_of_part(part, where) for part in content)


def _text_of_part(part: object, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise InputError(f"{where}: holds a part of type {kind!r}, and calibration takes text alone; leave it out.")


def _call(call: object) -> object:
    """A tool call whose arguments are an object, as templates expect, in place of JSON in a string."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        return {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}
    except ValueError:  # a template may take it as it is
        return call


def _tools(tools: object, where: str) -> list[Any] | None:
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError as error:
            raise InputError(f"{where}: field 'tools' is not valid JSON ({error}); fix or delete it.") from error
    if not tools:
        return None
    if not isinstance(tools, list):
        raise InputError(f"{where}: field 'tools' holds {type(tools).__name__}, where a list is needed; fix it.")
    return _without_nulls(tools)


def _without_nulls(value: object) -> Any:
    if isinstance(value, list):
        return [_without_nulls(element) for element in value]
    if isinstance(value, dict):
        return {name: _without_nulls(element) for name, element in value.items() if element is not None}
    return value


class Rendered(Sequence[str]):
    """Documents as text; a conversation is written out by the chat template when it is asked for.

    One that the template refuses (many want user and assistant to take turns) is the empty text.

    Attributes:
        refused: how many were refused.
    """

    def __init__(self, documents: Sequence[str | Conversation], tokenizer: PreTrainedTokenizerBase):
        self._documents, self._tokenizer = documents, tokenizer
        self.refused, self._reason = 0, ""
        first = next(self._conversations(), None)
        if first is not None and not getattr(tokenizer, "chat_template", None):
            raise InputError(
                f"{first.where}: holds a conversation, and the model's tokenizer has no chat template to write it out "
                "with. Put the chat_template.jinja of a chat model into the model's folder, or calibrate on plain text "
                "(--field names another field)."
            )

    def refusals(self) -> str:
        """How many conversations were refused, and why the first was."""
        return f"{self.refused} conversations; the first is {self._reason.rstrip('.')}."

    def _conversations(self) -> Iterator[Conversation]:
        return (document for document in self._documents if isinstance(document, Conversation))

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> str:
        document = self._documents[index]
        return document if isinstance(document, str) else self._render(document)

    def _render(self, document: Conversation) -> str:
        try:
            template = self._tokenizer.get_chat_template(tools=document.tools)
            text = self._tokenizer.apply_chat_template(
                document.messages,
                tools=document.tools,
                chat_template=_ONE_DAY + template if _NOW in template else template,
                tokenize=False,
            )
        except ImportError as error:
            raise InputError(f"{document.where}: the chat template can't be used ({error}).") from error
        except Exception as error:  # a template is a program, which raises what it likes
            self.refused += 1
            self._reason = self._reason or f"{document.where}: {str(error).strip() or type(error).__name__}"
            return ""
        return without_surrogates(text)
