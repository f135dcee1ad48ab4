"""A GGUF file turned, once, into a checkpoint folder of safetensors."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from distprune.checkpoint.durable import sync_tree
from distprune.checkpoint.storage_failures import failures_explained
from distprune.errors import InputError
from distprune.storage import CACHE_VARIABLE, cache_folder

# From 5.17 on, transformers leaves the weights packed unless told otherwise, and packed weights can't be saved.
UNPACKED = (
    {"quantization_config": transformers.GgufConfig(dequantize=True)} if hasattr(transformers, "GgufConfig") else {}
)
SPLIT_NAME = re.compile(r"-\d{5}-of-\d{5}\.gguf$")


def import_gguf(path: Path, cache_dir: Path | None = None) -> Path:
    """A folder with the GGUF file's weights as bf16 safetensors, its config, tokenizer and generation config.

    It lies at `CACHE/gguf/<name>-<start of the file's sha256>`, where CACHE is `cache_dir`, else
    $DISTPRUNE_CACHE, else ~/.cache/distprune. It is made the first time, in memory for the whole model, and
    found again after that. InputError: no such file, one piece of a split file, a broken file, no `gguf` package, or
    a cache that can't be written to. StorageFailed: there is no room in it.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist. Give the path of a .gguf file.")
    if SPLIT_NAME.search(path.name):
        raise InputError(f"{path} is one piece of a split file. Join the pieces with `llama-gguf-split --merge`.")
    if importlib.util.find_spec("gguf") is None:
        raise InputError(f"{path} needs the gguf package to be read. Install it with `pip install gguf`.")
    folder = _cache_root(cache_dir) / "gguf" / f"{path.stem}-{_sha256(path)[:16]}"
    if folder.is_dir():  # perhaps in a cache that others fill and this user only reads
        return folder
    _require_writable(folder.parent, path)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            _convert(path, folder)
    return folder


def _require_writable(cache: Path, path: Path) -> None:
    """Make the cache's folder, and raise InputError where it can't be written to."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            pass
    except OSError as error:
        raise InputError(
            f"{cache} can't be written to ({error.strerror}), and {path} is imported into it. Set the environment "
            f"variable {CACHE_VARIABLE} to a folder that can be, or make this one writable."
        ) from error


def _cache_root(cache_dir: Path | None) -> Path:
    return Path(cache_dir).expanduser() if cache_dir else cache_folder()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _convert(path: Path, folder: Path) -> None:
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with _quiet_transformers():
        model, tokenizer = _load(path)
        # The GGUF file's free-text title, which transformers would take for the name of a model on the hub.
        vars(model.config).pop("_model_name_or_path", None)
        with failures_explained(partial):
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
    sync_tree(partial)
    partial.rename(folder)


def _load(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=torch.bfloat16,
            output_loading_info=True,
            **UNPACKED,
        )
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # the parser raises whatever the broken bytes lead to
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{path} can't be read as GGUF ({reason}). Download it again, or use the model's safetensors release."
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise InputError(
            f"{path} lacks {len(missing)} of the model's tensors ({', '.join(missing[:4])}). "
            "Download it again, or use the model's safetensors release."
        )
    return model, tokenizer


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    # Progress bars and warnings go to stderr and have no common switch; what matters is an exception.
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
