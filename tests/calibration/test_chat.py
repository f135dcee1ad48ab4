"""Conversations become what the tokenizer's own chat template makes of them, special tokens once."""

from __future__ import annotations

import copy
import json
import logging

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from distprune.calibration import build_calibration
from distprune.calibration.chat import Rendered
from distprune.calibration.text_sources import read_source
from distprune.errors import InputError

# As ChatML, with a special token at the beginning as Llama's has; tools and calls as JSON.
TEMPLATE = (
    "{{ bos_token }}{% if tools %}tools {{ tools | tojson }}\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message.content or '' }}"
    "{% if 'tool_calls' in message %}calls {% for call in message.tool_calls %}"
    "{{ call.function.name }} {{ call.function.arguments | tojson }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
)
TAKES_TURNS = (
    "{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate.') }}{% endif %}{{ message.content }}{% endfor %}"
)

OPENAI = [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Blue."}]
SHAREGPT = [{"from": "human", "value": "Name a colour."}, {"from": "gpt", "value": "Blue."}]
PARTS = [
    {"role": "user", "content": [{"type": "text", "text": "Name "}, {"type": "text", "text": "a colour."}]},
    {"role": "assistant", "content": [{"type": "text", "text": "Blue."}]},
]
WRITTEN = "<s><|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\nBlue.<|im_end|>\n"


@pytest.fixture
def chat_tokenizer(tokenizer) -> PreTrainedTokenizerFast:
    able = copy.deepcopy(tokenizer)
    able.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    able.chat_template = TEMPLATE
    return able


def jsonl(path, records):
    path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return path


def texts(source, tokenizer) -> list[str]:
    return list(Rendered(source.documents, tokenizer))


@pytest.mark.parametrize("field", ["messages", "conversations"])
@pytest.mark.parametrize("messages", [OPENAI, SHAREGPT, PARTS], ids=["openai", "sharegpt", "parts"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "dataset"])
def test_conversations_are_written_by_the_template_and_read_from_their_start(
    tmp_path, monkeypatch, chat_tokenizer, field, messages, kind
):
    records, path = [{"id": 1, field: messages}, {"id": 2, field: messages}], tmp_path / f"a.{kind}"
    if kind == "jsonl":
        jsonl(path, records)
    elif kind == "json":
        path.write_text(json.dumps(records, indent=1))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        path = "someone/chats"
        monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: datasets.Dataset.from_list(records))
    source = read_source(path)
    assert texts(source, chat_tokenizer) == [WRITTEN] * 2
    assert source.from_start


def test_windows_hold_the_ids_that_the_tokenizer_itself_gives_a_conversation(model_path, model, tmp_path, tokenizer):
    folder = tmp_path / "model"
    able = copy.deepcopy(tokenizer)
    able.chat_template = TEMPLATE.replace("<|im_start|>", "</s>")
    model.save_pretrained(folder)
    able.save_pretrained(folder)
    conversations = [[{"role": "user", "content": f"{n} rivers run to the sea. " * 4}] for n in range(3)]
    chats = jsonl(tmp_path / "a.jsonl", [{"messages": messages} for messages in conversations])
    built = build_calibration(folder, texts=[chats], samples=3, sequence_length=16, output=tmp_path / "c.arrow")
    expected = {
        tuple(able.apply_chat_template(messages, tokenize=True)["input_ids"][:16]) for messages in conversations
    }
    assert {tuple(row) for row in built.tokens.tolist()} == expected
    begun = built.tokens[:, :2]
    assert np.array_equal(begun, np.broadcast_to([able.bos_token_id, able.eos_token_id], begun.shape))
    assert not (built.tokens[:, 1:] == able.bos_token_id).any()


def test_system_prompts_and_roles_of_sharegpt(tmp_path, chat_tokenizer):
    named = [{"from": "system", "value": "Be brief."}, *SHAREGPT]
    records = [{"conversations": named}, {"system": "Be brief.", "conversations": SHAREGPT}]
    found = texts(read_source(jsonl(tmp_path / "a.jsonl", records)), chat_tokenizer)
    assert found == [WRITTEN.replace("<s>", "<s><|im_start|>system\nBe brief.<|im_end|>\n")] * 2


def test_tools_and_calls_reach_the_template_from_json_and_from_tables(tmp_path, chat_tokenizer):
    call = {"type": "function", "function": {"name": "paint", "arguments": '{"colour": "blue"}'}}
    messages = [
        {"role": "user", "content": "Paint."},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "name": "paint", "content": "done"},
    ]
    # The keys in the order that older versions of Arrow give them.
    tools = [{"function": {"name": "paint"}, "type": "function"}, {"function": {"name": "draw"}, "type": "function"}]
    expected = (
        f"<s>tools {json.dumps(tools)}\n<|im_start|>user\nPaint.<|im_end|>\n<|im_start|>assistant\ncalls paint "
        '{"colour": "blue"}<|im_end|>\n<|im_start|>tool\ndone<|im_end|>\n'
    )
    records = [{"messages": messages, "tools": given} for given in (tools, json.dumps(tools))]
    assert texts(read_source(jsonl(tmp_path / "a.jsonl", records)), chat_tokenizer) == [expected] * 2
    pq.write_table(pa.Table.from_pylist(records[:1]), tmp_path / "a.parquet")  # which fills in null tool_calls
    assert texts(read_source(tmp_path / "a.parquet"), chat_tokenizer) == [expected]


def test_messages_may_be_json_in_a_tables_string(tmp_path, chat_tokenizer):
    pq.write_table(pa.table({"messages": [json.dumps(OPENAI)]}), tmp_path / "a.parquet")
    assert texts(read_source(tmp_path / "a.parquet"), chat_tokenizer) == [WRITTEN]


def test_the_field_chooses_between_text_and_conversation(tmp_path, chat_tokenizer):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "plain", "messages": OPENAI, "turns": SHAREGPT, "prompt": "short"}])
    assert read_source(path).documents == ["plain"]
    assert read_source(path, "prompt").documents == ["short"]
    for field in ("messages", "turns"):
        assert texts(read_source(path, field), chat_tokenizer) == [WRITTEN]


def test_a_tokenizer_without_a_chat_template_is_refused_with_the_fix(model_path, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"messages": OPENAI}])
    with pytest.raises(InputError, match=r"a\.jsonl, line 1: .*no chat template.*chat_template\.jinja.*--field"):
        build_calibration(model_path, texts=[path], samples=1, sequence_length=4, output=tmp_path / "c.arrow")
    assert not (tmp_path / "c.arrow").exists()


def test_conversations_that_the_template_refuses_are_left_out_and_counted(model, tokenizer, tmp_path, caplog):
    able, folder = copy.deepcopy(tokenizer), tmp_path / "model"
    able.chat_template = TAKES_TURNS
    model.save_pretrained(folder)
    able.save_pretrained(folder)
    good = {"messages": [{"role": "user", "content": "The river runs. " * 8}]}
    odd = {"messages": [{"role": "assistant", "content": "It begins. " * 8}]}
    options = {"sequence_length": 8, "output": tmp_path / "c.arrow"}
    path = jsonl(tmp_path / "a.jsonl", [odd, good, good])
    with caplog.at_level(logging.WARNING, "distprune"):
        built = build_calibration(folder, texts=[path], samples=2, **options)
    assert {able.decode(row) for row in built.tokens.tolist()} == {able.decode(built.tokens[0].tolist())}
    assert "refused 1 conversations; the first is" in caplog.text and "line 1: Roles must alternate." in caplog.text
    with pytest.raises(InputError, match=r"holds only 0 windows.*refused 1 conversations.*Roles must alternate"):
        build_calibration(folder, texts=[jsonl(path, [odd])], samples=1, **options)


def test_a_template_that_writes_the_date_gives_the_same_text_every_day(chat_tokenizer, tmp_path):
    written = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %} {{ messages[0].content }}"
    chat_tokenizer.chat_template = f"\n  {{% set blank = '' %}}{written}"
    source = read_source(jsonl(tmp_path / "a.jsonl", [{"messages": OPENAI}]))
    assert texts(source, chat_tokenizer) == ["\n01 Jan 2025 Name a colour."]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (["Hello"], r"line 1, message 1: holds str, where an object"),
        ([OPENAI[0], {"speaker": "me"}], r"line 1, message 2: has neither 'role' and 'content' nor 'from' and 'value'"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], r"message 1: .*type 'image_url'"),
        ([{"role": "user", "content": 3}], r"message 1: its content is int"),
        ({"role": "user"}, r"line 1: field 'messages' holds dict, not text"),
        ("[{'role': 'user'}]", r"line 1: field 'messages' holds a list that is not valid JSON"),
    ],
)
def test_what_is_no_conversation_is_named(tmp_path, messages, message):
    with pytest.raises(InputError, match=message):
        read_source(jsonl(tmp_path / "a.jsonl", [{"messages": messages}]))


def test_empty_conversations_hold_no_text(tmp_path, chat_tokenizer):
    path = jsonl(tmp_path / "a.jsonl", [{"messages": []}, {"messages": None}, {"messages": OPENAI}])
    assert texts(read_source(path), chat_tokenizer) == ["", "", WRITTEN]
    with pytest.raises(InputError, match="holds no text"):
        read_source(jsonl(path, [{"messages": []}]))
