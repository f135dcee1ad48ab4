"""A fast tokenizer in the metadata of a GGUF file, as llama.cpp reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
from gguf import GGUFReader, GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

from distprune.calibration import load_tokenizer
from distprune.checkpoint.layout import read_json
from distprune.errors import InputError

ELSEWHERE = "llama.cpp's convert_hf_to_gguf.py may know it."
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def add_tokenizer(writer: GGUFWriter, folder: Path, vocabulary: int, pre: str | None) -> None:
    """Write the tokenizer of a checkpoint folder.

    Args:
        writer: of the file.
        folder: of the checkpoint.
        vocabulary: how many tokens the model knows; those beyond the tokenizer's are padded.
        pre: llama.cpp's name for how the tokenizer splits text into words, or a GGUF file that has it; found out from
            tokenizer.json if not given.

    Raises:
        InputError: the tokenizer is not byte-level BPE, or splits text in a way that llama.cpp has no known name for.
    """
    tokenizer, file = load_tokenizer(folder), folder / "tokenizer.json"
    if not file.is_file():
        raise InputError(f"{file} does not exist. Save the model's fast tokenizer there with save_pretrained.")
    description = read_json(file)
    check_tokenizer(file, description)
    tokens, types = vocabulary_of(file, description, vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer(file, description, pre))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = description["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    add_special_tokens(writer, tokenizer)


def check_tokenizer(file: Path, description: dict[str, Any]) -> None:
    model = description["model"]
    if model["type"] != "BPE" or model.get("byte_fallback") or description.get("normalizer"):
        raise InputError(f"{file} is not a byte-level BPE tokenizer like those of GPT-2 and Llama 3. {ELSEWHERE}")


def vocabulary_of(file: Path, description: dict[str, Any], size: int) -> tuple[list[str], list[TokenType]]:
    """Every id's token and what kind it is, up to the model's vocabulary size."""
    entries = {number: (token, TokenType.NORMAL) for token, number in description["model"]["vocab"].items()}
    for added in description["added_tokens"]:
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        entries[added["id"]] = (added["content"], kind)
    if max(entries) >= size:
        raise InputError(f"{file} has the id {max(entries)}, but the model's vocabulary has {size} tokens.")
    filled = [entries.get(number, (f"[PAD{number}]", TokenType.UNUSED)) for number in range(size)]
    return [token for token, _ in filled], [kind for _, kind in filled]


def pre_tokenizer(file: Path, description: dict[str, Any], given: str | None) -> str:
    """llama.cpp's name for how the tokenizer splits text into words."""
    if given and given.endswith(".gguf"):
        return pre_tokenizer_of(Path(given))
    if given:
        return given
    match splitting_steps(description.get("pre_tokenizer")):
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return "gpt-2"
        case [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        ]:
            return "smollm"
        case [
            {"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ] if words == LLAMA3_WORDS:
            return "llama-bpe"
    raise InputError(f"{file} splits text in a way that has no name here. Give llama.cpp's name for it with --pre.")


def splitting_steps(description: dict[str, Any] | None) -> list[dict[str, Any]]:
    if description is None:
        return []
    return description["pretokenizers"] if description["type"] == "Sequence" else [description]


def pre_tokenizer_of(file: Path) -> str:
    """The pre-tokenizer that a GGUF file names."""
    if not file.is_file():
        raise InputError(f"{file} does not exist. Give --pre a GGUF file or llama.cpp's name of a pre-tokenizer.")
    try:
        field = GGUFReader(file).get_field(gguf.Keys.Tokenizer.PRE)
    except ValueError as error:
        raise InputError(f"{file} can't be read as GGUF ({error}). Download it again.") from error
    if field is None:
        raise InputError(f"{file} names no pre-tokenizer. Give llama.cpp's name for it with --pre.")
    return field.contents()


def add_special_tokens(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase) -> None:
    for kind in ("bos", "eos", "unk", "pad"):
        if (number := getattr(tokenizer, f"{kind}_token_id")) is not None:
            getattr(writer, f"add_{kind}_token_id")(number)
    around = tokenizer("").input_ids
    begins = tokenizer.bos_token_id in around[:1]
    writer.add_add_bos_token(begins)
    writer.add_add_eos_token(tokenizer.eos_token_id in around[begins:])
    writer.add_add_space_prefix(False)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
