"""A plain Llama checkpoint, such as `--layout stock` gives, as a GGUF file for llama.cpp and what is built on it.

    python scripts/to_gguf.py pruned pruned.gguf
    python scripts/to_gguf.py pruned pruned.gguf --pre SmolLM2-135M-Instruct.Q4_1.gguf

Reads and writes one tensor at a time. How a tokenizer splits text into words llama.cpp knows by name: the name follows
from tokenizer.json, unless `--pre` gives it, or the GGUF file that the model came from. Requirements the `gguf` package (extra
`demo`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from accelerate import init_empty_weights
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType, TokenType
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerBase
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from distprune.calibration import load_tokenizer
from distprune.checkpoint import Checkpoint
from distprune.checkpoint.durable import replacing
from distprune.checkpoint.layout import read_json
from distprune.errors import InputError, RunFailed

ELSEWHERE = "llama.cpp's convert_hf_to_gguf.py may know it."
FILE_TYPES = {"f16": LlamaFileType.MOSTLY_F16, "f32": LlamaFileType.ALL_F32}
QUANTIZATIONS = {np.float16: GGMLQuantizationType.F16, np.float32: GGMLQuantizationType.F32}
# Rotary embeddings whose frequencies are the same for every context length and whose scores are not scaled.
FIXED_ROPE = ("default", "linear", "llama3")
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def main() -> None:
    arguments = parse_arguments()
    try:
        convert(arguments.folder, arguments.output, arguments.dtype, arguments.pre)
    except (InputError, RunFailed) as error:
        print(error, file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="checkpoint folder of a Llama model")
    parser.add_argument("output", type=Path, help="the GGUF file to write; one that is there is replaced")
    parser.add_argument("--dtype", choices=FILE_TYPES, default="f16", help="of matrices; vectors are f32")
    parser.add_argument("--pre", metavar="NAME|FILE.gguf", help="llama.cpp's pre-tokenizer [by tokenizer.json]")
    return parser.parse_args()


def convert(folder: Path, output: Path, dtype: str = "f16", pre: str | None = None) -> None:
    """Write the checkpoint in `folder` to the GGUF file `output`, matrices as `dtype` ("f16" or "f32").

    Raises InputError: the folder holds no plain Llama model, its tokenizer is not byte-level BPE or one that llama.cpp
    has no known name for, or a weight is out of float16's range.
    """
    checkpoint = Checkpoint.open(folder)
    check_architecture(folder, checkpoint.config)
    tensors = list(gguf_tensors(checkpoint, dtype))
    if not output.parent.is_dir():
        raise InputError(f"{output.parent} is not a folder. Make it, or give another place for the GGUF file.")
    writer = GGUFWriter(None, "llama")
    writer.add_name(folder.resolve().name)
    add_hyperparameters(writer, checkpoint.config)
    writer.add_file_type(FILE_TYPES[dtype])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_tokenizer(writer, folder, checkpoint.config.vocab_size, pre)
    with replacing(output) as temporary, closing(writer):
        write(writer, temporary, tensors)


def check_architecture(folder: Path, config: Any) -> None:
    file = folder / "config.json"
    if config.model_type == "distprune":
        raise InputError(
            f"{file}: its layers have widths of their own, which llama.cpp can't load. "
            "Prune with --layout stock for a plain checkpoint."
        )
    if config.model_type != "llama":
        raise InputError(f"{file} is of a {config.model_type} model; this script knows llama only. {ELSEWHERE}")
    if config.attention_bias or config.mlp_bias:
        raise InputError(f"{file}: its projections have biases, which this script doesn't write. {ELSEWHERE}")
    if config.hidden_act != "silu":
        raise InputError(f"{file}: llama.cpp's Llama has silu for an activation, not {config.hidden_act}.")
    if (rope := config.rope_parameters["rope_type"]) not in FIXED_ROPE:
        raise InputError(
            f"{file}: this script knows rotary embeddings of type {', '.join(FIXED_ROPE)}, not {rope}. {ELSEWHERE}"
        )


def add_hyperparameters(writer: GGUFWriter, config: LlamaConfig) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)


# ---------------------------------------------------------------- weights


@dataclass(frozen=True)
class GgufTensor:
    """A tensor's name and shape in the file, its element type there, and where it comes from."""

    name: str
    shape: tuple[int, ...]
    dtype: type[np.floating]
    read: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


def gguf_tensors(checkpoint: Checkpoint, dtype: str) -> Iterator[GgufTensor]:
    """All tensors of the file, in the model's order. InputError where the checkpoint lacks one."""
    config = checkpoint.config
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:  # without a head of its own llama.cpp takes the embedding
        del expected["lm_head.weight"]
    checkpoint.check_shapes(expected)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    scaling = rope_scaling(config)
    if (scaling != 1).any():
        yield GgufTensor("rope_freqs.weight", tuple(scaling.shape), np.float32, lambda: scaling)
    matrix = np.float16 if dtype == "f16" else np.float32
    for name, shape in expected.items():
        kind = matrix if len(shape) > 1 else np.float32
        yield GgufTensor(
            names.get_name(name, try_suffixes=(".weight",)), shape, kind, lambda name=name: weights(checkpoint, name)
        )


def rope_scaling(config: LlamaConfig) -> Tensor:
    """What llama.cpp divides the frequency of each rotary pair by, (head_dim / 2,) float32."""
    plain = LlamaConfig(**{**config.to_dict(), "rope_parameters": {**config.rope_parameters, "rope_type": "default"}})
    return LlamaRotaryEmbedding(plain).inv_freq / LlamaRotaryEmbedding(config).inv_freq


def weights(checkpoint: Checkpoint, name: str) -> Tensor:
    """The named tensor as llama.cpp wants it."""
    tensor, config = checkpoint.read([name])[name], checkpoint.config
    if name.endswith("q_proj.weight"):
        return pairs_side_by_side(tensor, config.num_attention_heads)
    if name.endswith("k_proj.weight"):
        return pairs_side_by_side(tensor, config.num_key_value_heads)
    return tensor


def pairs_side_by_side(weight: Tensor, heads: int) -> Tensor:
    """Rows (heads * head_dim, d) of queries or keys with each rotary pair's two rows beside each other.

    In Hugging Face's Llama the pair's rows are head_dim / 2 apart, which is how `rotate_half` takes them.
    """
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def write(writer: GGUFWriter, file: Path, tensors: list[GgufTensor]) -> None:
    for tensor in tensors:
        quantization = QUANTIZATIONS[tensor.dtype]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(tensor.dtype), tensor.bytes, quantization)
    writer.write_header_to_file(file)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        data = tensor.read().to(torch.float32).numpy()
        with np.errstate(over="ignore"):
            stored = data.astype(tensor.dtype)
        if not np.isfinite(stored).all():
            raise InputError(f"{tensor.name} has weights that are no finite {np.dtype(tensor.dtype)}. Try --dtype f32.")
        writer.write_tensor_data(np.ascontiguousarray(stored))


# ---------------------------------------------------------------- the tokenizer


def add_tokenizer(writer: GGUFWriter, folder: Path, vocabulary: int, pre: str | None) -> None:
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


if __name__ == "__main__":
    main()
