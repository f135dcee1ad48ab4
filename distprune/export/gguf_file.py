"""A Llama or Mixtral checkpoint as a GGUF file for llama.cpp and what is built on it.

One in the layout stock is of llama.cpp's architecture `llama`, which has mixtures of experts; a Llama in the layout
heterogeneous is of `deci`, whose layers have numbers of heads and neurons of their own. Reads and writes one tensor at
a time. Needs the `gguf` package.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import gguf
from gguf import GGUFWriter, LlamaFileType
from transformers import PreTrainedConfig

from distprune.checkpoint import Checkpoint
from distprune.checkpoint.durable import replacing
from distprune.errors import InputError
from distprune.export.gguf_tensors import gguf_tensors, head_dim, write_tensors
from distprune.export.gguf_tokenizer import ELSEWHERE, add_tokenizer
from distprune.layers.architecture import PRUNED_LAYERS

KNOWN = ("llama", "mixtral")
FILE_TYPES = {"f16": LlamaFileType.MOSTLY_F16, "f32": LlamaFileType.ALL_F32}
# Rotary embeddings whose frequencies are the same for every context length and whose scores are not scaled.
FIXED_ROPE = ("default", "linear", "llama3")


def export(folder: Path, output: Path, dtype: str = "f16", pre: str | None = None) -> None:
    """Write a checkpoint as a GGUF file; one that is there is replaced.

    Args:
        folder: of a Llama checkpoint in the layout stock or heterogeneous, or of a Mixtral in the layout stock.
        output: the file.
        dtype: of matrices, "f16" or "f32"; vectors are f32.
        pre: llama.cpp's name for how the tokenizer splits text into words, or a GGUF file that has it, such as the one
            that the model came from; found out from tokenizer.json if not given.

    Raises:
        InputError: the folder holds no such checkpoint, its tokenizer is not byte-level BPE or one that llama.cpp has
            no known name for, or a weight is out of float16's range.
    """
    folder, output = Path(folder), Path(output)
    checkpoint = Checkpoint.open(folder)
    check_architecture(folder, checkpoint.config)
    architecture = "deci" if checkpoint.config.is_heterogeneous else "llama"
    tensors = list(gguf_tensors(checkpoint, architecture, dtype))
    if not output.parent.is_dir():
        raise InputError(f"{output.parent} is not a folder. Make it, or give another place for the GGUF file.")
    writer = GGUFWriter(None, architecture)
    writer.add_name(folder.resolve().name)
    add_hyperparameters(writer, checkpoint.config)
    writer.add_file_type(FILE_TYPES[dtype])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_tokenizer(writer, folder, checkpoint.config.vocab_size, pre)
    with replacing(output) as temporary, closing(writer):
        write_tensors(writer, temporary, tensors)


def check_architecture(folder: Path, config: PreTrainedConfig) -> None:
    file = folder / "config.json"
    if getattr(config, PRUNED_LAYERS, None):
        raise InputError(
            f"{file}: its layers have factors, branches or widths that llama.cpp can't load. Prune with --layout "
            "heterogeneous or --layout stock."
        )
    if config.model_type not in KNOWN:
        raise InputError(
            f"{file} is of a {config.model_type} model; the export knows {' and '.join(KNOWN)} only. {ELSEWHERE}"
        )
    if config.model_type == "mixtral" and config.is_heterogeneous:
        raise InputError(
            f"{file}: llama.cpp has no mixtures of experts whose layers differ. Prune with --layout stock."
        )
    if getattr(config, "sliding_window", None):
        raise InputError(f"{file}: its attention has a sliding window, which llama.cpp's Llama doesn't. {ELSEWHERE}")
    if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        raise InputError(f"{file}: its projections have biases, which the export doesn't write. {ELSEWHERE}")
    if config.hidden_act != "silu":
        raise InputError(f"{file}: llama.cpp's Llama has silu for an activation, not {config.hidden_act}.")
    if (rope := config.rope_parameters["rope_type"]) not in FIXED_ROPE:
        raise InputError(
            f"{file}: the export knows rotary embeddings of type {', '.join(FIXED_ROPE)}, not {rope}. {ELSEWHERE}"
        )


def add_hyperparameters(writer: GGUFWriter, config: PreTrainedConfig) -> None:
    layers, of_each = config.per_layer_config, config.is_heterogeneous

    def sizes(name: str) -> int | list[int]:
        return [getattr(layer, name) for layer in layers] if of_each else getattr(config, name)

    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(sizes("intermediate_size"))
    writer.add_head_count(sizes("num_attention_heads"))
    writer.add_head_count_kv(sizes("num_key_value_heads"))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    width = head_dim(config)
    writer.add_rope_dimension_count(width)
    if of_each or width * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(width)
        writer.add_value_length(width)
    if config.model_type == "mixtral":
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
