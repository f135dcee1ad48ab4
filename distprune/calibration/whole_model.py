"""The dense or pruned model, whole, for the two jobs that need one: sampling from it and evaluating it."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from distprune.errors import InputError
from distprune.hardware import AUTO, compute_dtype
from distprune.modeling import load


def load_config(model_path: str | Path, trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration of the model's text decoder. Raises InputError when there is none."""
    try:
        config = AutoConfig.from_pretrained(model_path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise _unreadable(model_path, error) from error
    return config.get_text_config(decoder=True)


def load_model(
    model_path: str | Path,
    device: str = "auto",
    dtype: str | torch.dtype = AUTO,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model, ready for inference.

    `device` "auto" takes the GPUs when there are any and the CPU otherwise. On "cuda" the model is spread
    over all GPUs, then host memory, then disk, so that one larger than a GPU runs as well; "cuda:1" means
    that GPU alone. `dtype` "auto" keeps the checkpoint's where the device has units for it, and is float32
    elsewhere. Raises InputError.
    """
    device, dtype = checked_device(device), checked_dtype(dtype)
    if dtype == AUTO:
        stored = load_config(model_path, trust_remote_code).dtype
        dtype = AUTO if stored is None else compute_dtype(stored, device).dtype
    try:
        if device == "cuda":
            return _load_spread(model_path, dtype, trust_remote_code).eval()
        return _load(model_path, trust_remote_code, dtype=dtype).to(device).eval()
    except (OSError, ValueError, ImportError) as error:
        raise _unreadable(model_path, error) from error


def input_device(model: PreTrainedModel) -> torch.device:
    """Where the model's token ids must lie."""
    device = model.get_input_embeddings().weight.device
    # An embedding that is offloaded lies on "meta" between calls; accelerate's hooks then move the inputs.
    return torch.device("cpu") if device.type == "meta" else device


def check_sequence_length(sequence_length: int, config: PretrainedConfig, model_path: str | Path) -> None:
    """Raise InputError unless windows of this many tokens can be predicted by the model."""
    if sequence_length < 2:
        raise InputError(f"--sequence-length {sequence_length}: a window needs at least 2 tokens.")
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and sequence_length > longest:
        raise InputError(
            f"--sequence-length {sequence_length}: {model_path} takes at most {longest} tokens "
            "(max_position_embeddings)."
        )


def checked_device(device: str) -> str:
    """The device that an option names, "auto" settled. Raises InputError where this machine has none such."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"--device {device}: is no device; use 'auto', 'cpu', 'cuda' or 'cuda:1'.") from error
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {device}: PyTorch sees {torch.cuda.device_count()} CUDA devices; use 'auto'.")
    return device


def checked_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """The dtype that an option names, or "auto". Raises InputError where it is none to compute in."""
    found = dtype if dtype == AUTO or isinstance(dtype, torch.dtype) else getattr(torch, dtype, None)
    if found != AUTO and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise InputError(f"--dtype {dtype}: is no dtype to compute in; use 'auto', 'bfloat16', 'float16' or 'float32'.")
    return found


def _load(model_path: str | Path, trust_remote_code: bool, **options: Any) -> PreTrainedModel:
    """The model by code that came with it, or by transformers' and this package's."""
    if trust_remote_code:
        return AutoModelForCausalLM.from_pretrained(model_path, trust_remote_code=True, **options)
    return load(model_path, **options)


def _load_spread(model_path: str | Path, dtype: str | torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    offload = tempfile.mkdtemp(prefix="distprune-offload-")
    try:
        model = _load(model_path, trust_remote_code, dtype=dtype, device_map="auto", offload_folder=offload)
    except BaseException:
        shutil.rmtree(offload, ignore_errors=True)
        raise
    weakref.finalize(model, shutil.rmtree, offload, ignore_errors=True)
    return model


def _unreadable(model_path: str | Path, error: Exception) -> InputError:
    reason = str(error).strip().partition("\n")[0]
    return InputError(
        f"{model_path}: no causal language model could be loaded ({reason}). "
        "Give a directory that holds config.json and the weights, or the name of a model on the Hugging Face Hub."
    )
