"""How a model is quantized, by its config.json and its tensors' names: in a form that can be read, or why it can't."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PretrainedConfig

from distprune.checkpoint.infos import TensorInfo
from distprune.errors import InputError

DEQUANTIZE = "Quantized checkpoints must be dequantized first: use the model's bf16 or fp16 release."
RELEASE = "Use the bf16 or fp16 release that it was made from."
#: How a model is had back in 16 bits where its quantizer's own code does that.
FIXES = {
    "bitsandbytes": "Load it with from_pretrained, call the model's dequantize(), and write it with save_pretrained.",
}
# What quantizers (GPTQ, AWQ, compressed-tensors, bitsandbytes) call the tensors that they put in a weight's place.
PACKED = (
    *(".qweight", ".qzeros", ".g_idx", ".scales", ".weight_packed", ".weight_scale", ".weight_zero_point"),
    *(".weight.absmax", ".weight.quant_map", ".SCB", ".weight_scale_inv"),
)
# Those of experts in mxfp4.
PACKED_BYTES = ("_blocks", "_scales")


@dataclass(frozen=True)
class Fp8Scheme:
    """How a model's fp8 weights are scaled.

    Attributes:
        blocks: (rows, columns) that one scale may cover; scales for whole tensors and for rows need no mention.
        has_cache_scales: whether there are also scales for a key/value cache in fp8.
    """

    form: ClassVar[str] = "fp8"
    blocks: tuple[tuple[int, int], ...] = ()
    has_cache_scales: bool = False


@dataclass(frozen=True)
class Mxfp4Scheme:
    """gpt-oss' form: experts in blocks of 32 numbers of four bits, each block with an exponent for all of them."""

    form: ClassVar[str] = "mxfp4"


Scheme = Fp8Scheme | Mxfp4Scheme


def find_scheme(file: Path, content: Mapping[str, Any]) -> Scheme | None:
    """How the weights are scaled by what config.json, read as ``content``, says; None where they aren't quantized.

    Raises:
        InputError: they are quantized in a form that is not dequantized on reading.
    """
    text = content.get("text_config")
    for part in (content, text if isinstance(text, dict) else {}):
        if said := part.get("quantization_config"):
            return _scheme_of(file, said)
        if said := part.get("compression_config"):  # as compressed-tensors had it at first
            return _scheme_of(file, {"quant_method": "compressed-tensors", **said})
    return None


def forget_quantization(config: PretrainedConfig) -> None:
    """Make a configuration that of the dequantized model."""
    for part in filter(None, (config, getattr(config, "text_config", None))):
        for name in ("quantization_config", "compression_config"):
            if hasattr(part, name):
                delattr(part, name)
        if part.dtype is not None and part.dtype.itemsize == 1:
            part.dtype = torch.bfloat16


def refuse_packed(tensors: Mapping[str, TensorInfo], scheme: Scheme | None) -> None:
    """Raise InputError where weights are quantized and config.json doesn't say so, or says that it's done otherwise."""
    for name, info in tensors.items():
        is_float = info.dtype.is_floating_point
        in_eight_bits = is_float and info.dtype.itemsize == 1
        packed_bytes = info.dtype == torch.uint8 and name.endswith(PACKED_BYTES)
        if packed_bytes or name.endswith(PACKED) or in_eight_bits or (name.endswith(".weight") and not is_float):
            stored = str(info.dtype).removeprefix("torch.")
            said = "describes it otherwise" if scheme else "has no quantization_config"
            raise InputError(
                f"{info.file}: tensor {name} ({stored}) is part of a quantized checkpoint, although config.json "
                f"{said}. {DEQUANTIZE}"
            )


def notes_on(scheme: Scheme | None) -> tuple[str, ...]:
    """What the user should know of how the weights are read."""
    if scheme is None:
        return ()
    dequantized = "it is dequantized to bfloat16 on reading, and pruned and written as that."
    return (f"The model is stored in {scheme.form}: {dequantized}",)


def _scheme_of(file: Path, said: Any) -> Scheme:
    if not isinstance(said, dict):
        raise _refused(file, "a quantization_config that is no JSON object", RELEASE)
    method = said.get("quant_method") or "a method that it does not name"
    read = {"fp8": _fine_grained, "compressed-tensors": _compressed_tensors, "mxfp4": _mxfp4}.get(method)
    if read is None:
        raise _refused(file, method, FIXES.get(method, RELEASE))
    try:
        return read(said)
    except (AttributeError, TypeError, ValueError) as error:
        raise _refused(file, f"{method} ({error})", RELEASE) from None


def _fine_grained(said: Mapping[str, Any]) -> Fp8Scheme:
    """DeepSeek's and Qwen's form, which transformers calls FineGrainedFP8Config: a scale a block, or one a tensor."""
    return Fp8Scheme(_blocks(said.get("weight_block_size")))


def _compressed_tensors(said: Mapping[str, Any]) -> Fp8Scheme:
    """llm-compressor's form: a scale for each tensor, row or block, as each of its groups of layers says."""
    for name in ("sparsity_config", "transform_config"):
        if said.get(name) and said[name].get("format") != "dense":
            raise ValueError(f"its {name} is not read")
    blocks = ()
    for weights in _weights_of_groups(said):
        form = {name: weights.get(name) for name in ("type", "num_bits", "strategy")}
        fp8 = form["type"] == "float" and form["num_bits"] == 8 and weights.get("symmetric", True)
        if not fp8 or form["strategy"] not in ("tensor", "channel", "block"):
            raise ValueError("weights of " + ", ".join(f"{name} {value}" for name, value in form.items()))
        blocks += _blocks(weights.get("block_structure"))
    return Fp8Scheme(blocks, has_cache_scales=bool(said.get("kv_cache_scheme")))


def _mxfp4(said: Mapping[str, Any]) -> Mxfp4Scheme:
    return Mxfp4Scheme()


def _weights_of_groups(said: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    groups = said.get("config_groups") or {}
    if not groups:
        raise ValueError("no config_groups")
    for group in groups.values():
        if group.get("weights"):  # a group may quantize activations alone
            yield group["weights"]


def _blocks(said: Any) -> tuple[tuple[int, int], ...]:
    """A block's (rows, columns), in a list or, as compressed-tensors once had it, as text: 128x128."""
    if not said:
        return ()
    rows, columns = map(int, said.split("x") if isinstance(said, str) else said)
    if min(rows, columns) < 1:
        raise ValueError(f"blocks of {rows} x {columns}")
    return ((rows, columns),)


def _refused(file: Path, form: str, fix: str) -> InputError:
    return InputError(f"{file} describes a checkpoint quantized by {form}, which is not read. {fix}")
