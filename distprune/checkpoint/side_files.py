"""What lies beside a model's weights: which of it belongs to the model, and how it travels to another folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub.utils import filter_repo_objects
from transformers.dynamic_module_utils import get_relative_import_files

from distprune.checkpoint.disk import GB
from distprune.checkpoint.layout import ADAPTER_CONFIG_FILE, ADAPTER_FILES, CONFIG_FILE, INDEX_SUFFIX, read_json
from distprune.errors import InputError

# Patterns as the hub's client takes them: a * matches / too.
WEIGHTS = ("*.safetensors",)
OTHER_WEIGHTS = (
    *("*.bin", "*.pt", "*.pth", "*.ckpt", "*.distcp", "*.pkl", "*.pickle", "*.h5", "*.msgpack", "*.npz", "*.gguf"),
    *("*.onnx", "*.onnx_data", "*.tflite", "*.ot", "*.nemo", "*.mlmodel", "*.llamafile"),
)
OTHER_FORMATS = ("original/*", "onnx/*", "openvino/*", "coreml/*", "metal/*", "params.json")
TRAINING = ("checkpoint-*/*", "global_step*/*", "runs/*", "logs/*", "wandb/*", "trainer_state.json", "zero_to_fp32.py")
DATA = ("*.arrow", "*.parquet", "*.jsonl", "*.mp4", "*.wav", "*.mp3")
ARCHIVES = ("*.zip", "*.tar", "*.tar.*", "*.tgz", "*.7z")
CACHES = (".*", "*/.*", "*__pycache__/*", "*.lock", "*.incomplete")
#: What of a folder or repository is neither the model nor anything that it needs.
LEFT_OUT = (*OTHER_WEIGHTS, *OTHER_FORMATS, *TRAINING, *DATA, *ARCHIVES, *CACHES)
# What a result has of its own, or what is no longer true of it. Code is copied where it is named, see `_settle_code`.
REPLACED = (*WEIGHTS, f"*{INDEX_SUFFIX}", CONFIG_FILE, *ADAPTER_FILES, "README*", "ORIGINAL_README*", "*.py")
#: A model card, and the name of the original's beside that of a result.
MODEL_CARD, ORIGINAL_CARD = "README.md", "ORIGINAL_README.md"
# What tells that a folder holds a model of its own, or the same in another form.
SIGNS_OF_A_MODEL = (*WEIGHTS, *OTHER_WEIGHTS, f"*/{CONFIG_FILE}", f"*/{ADAPTER_CONFIG_FILE}")
# The files whose `auto_map` names code, config.json aside.
NAMING_CODE = "*_config.json"
LARGEST = GB // 4


def copy_side_files(source: Path, destination: Path, *, trust_remote_code: bool = False) -> None:
    """Copy what a checkpoint has beside its weights: tokenizer, chat templates, generation config, licence and more.

    All of it is copied but weights in any format and their indexes, config.json, READMEs, the state of a training, data
    sets, caches, hidden files and archives; folders that hold a model of their own; and a file or folder of more than
    250 MB. Links, as in the hub's cache, are followed. Python modules are copied where
    `trust_remote_code` is given and a copied file's `auto_map` names them, or a module that it names imports them.
    Without it, an `auto_map` is removed: the result opens as the model did for the run, without its code. The model
    card becomes ORIGINAL_README.md: it says what is true of the original alone, and whose the model is.

    InputError: a copied configuration is no JSON object, or its code imports a module that is not there.
    """
    source, destination = Path(source), Path(destination)
    for file in _side_files(source):
        _copy(file, source, destination)
    if (source / MODEL_CARD).is_file():
        shutil.copyfile(source / MODEL_CARD, destination / ORIGINAL_CARD)
    for file in sorted(destination.glob(NAMING_CODE)):
        _settle_code(file, source, trust_remote_code)


def _side_files(source: Path) -> Iterator[Path]:
    for entry in sorted(source.iterdir()):
        files = _files_of(entry)
        if entry.is_dir() and any(_matching(files, source, allow_patterns=[*SIGNS_OF_A_MODEL])):
            continue
        kept = list(_matching(files, source, ignore_patterns=[*LEFT_OUT, *REPLACED]))
        if sum(file.stat().st_size for file in kept) <= LARGEST:
            yield from kept


def _files_of(entry: Path) -> list[Path]:
    if entry.is_dir():
        return sorted(
            file for root, _, names in os.walk(entry) for name in names if (file := Path(root, name)).is_file()
        )
    return [entry] if entry.is_file() else []


def _matching(files: Iterable[Path], source: Path, **patterns: list[str]) -> Iterator[Path]:
    return filter_repo_objects(files, key=lambda file: file.relative_to(source).as_posix(), **patterns)


def _copy(file: Path, source: Path, destination: Path) -> None:
    target = destination / file.relative_to(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, target)


def _settle_code(file: Path, source: Path, trusted: bool) -> None:
    """Copy the modules that a copied file's `auto_map` names, with those that they import, or remove the `auto_map`."""
    if b'"auto_map"' not in file.read_bytes():
        return
    content = read_json(source / file.name)
    if not trusted:
        content.pop("auto_map", None)
        file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return
    for module in _named_modules(content.get("auto_map")):
        try:
            for needed in (source / module, *map(Path, get_relative_import_files(source / module))):
                _copy(needed, source, file.parent)
        except FileNotFoundError as error:
            raise InputError(
                f"{source / file.name} names code that is not there ({error.filename}). Download the model again, or "
                "remove the auto_map."
            ) from error


def _named_modules(auto_map: Any) -> Iterator[str]:
    """The Python files of its own folder that an `auto_map` names; one with -- is another repository's."""
    for value in auto_map.values() if isinstance(auto_map, dict) else [auto_map]:
        for reference in value if isinstance(value, list) else [value]:
            if isinstance(reference, str) and "--" not in reference:
                yield f"{reference.split('.')[0]}.py"
