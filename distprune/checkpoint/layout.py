"""Which files make up a checkpoint folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distprune.errors import InputError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def require_checkpoint(folder: Path) -> None:
    """Raise InputError unless `folder` holds a config.json and safetensors weights."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder. Give a Hugging Face checkpoint folder.")
    if not (folder / CONFIG_FILE).is_file():
        raise InputError(
            f"{folder} holds no config.json, so it is not a Hugging Face checkpoint. "
            "Give the folder that holds config.json and the *.safetensors files."
        )
    if any(folder.glob("*.safetensors")) or (folder / INDEX_FILE).is_file():
        return
    if any(folder.glob("pytorch_model*.bin")):
        raise InputError(
            f"{folder} holds pytorch_model.bin weights, which are pickled and so not read. Convert them "
            "once: load the folder with AutoModelForCausalLM.from_pretrained and write it with "
            "save_pretrained, which makes safetensors files."
        )
    if gguf := sorted(folder.glob("*.gguf")):
        raise InputError(f"{folder} holds no *.safetensors weights. To use its GGUF weights give the file: {gguf[0]}")
    raise InputError(
        f"{folder} holds no *.safetensors weights. Download the whole model, or write it as safetensors "
        "with save_pretrained."
    )


def find_weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors files: the shards its index names, or the one weight file it holds."""
    if (folder / INDEX_FILE).is_file():
        return _shards(folder)
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    files = sorted(folder.glob("*.safetensors"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:4])
        raise InputError(
            f"{folder} holds {len(files)} safetensors files ({names}, ...) but no {INDEX_FILE} "
            "that says what is in them. Download the index too, or write the model anew with save_pretrained."
        )
    return files


def read_weight_map(folder: Path) -> dict[str, str]:
    """The index's tensor name -> shard file name; empty where the folder has no index."""
    index_file = folder / INDEX_FILE
    if not index_file.is_file():
        return {}
    weight_map = read_json(index_file).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{index_file} has no weight_map of tensor names to files. Download the file again.")
    return weight_map


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file that holds one object; InputError where it holds anything else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is not valid JSON ({error}). Download the file again.") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} should hold a JSON object, not a {type(content).__name__}. Download the file again.")
    return content


def _shards(folder: Path) -> list[Path]:
    files = [folder / name for name in sorted(set(read_weight_map(folder).values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise InputError(
            f"{folder / INDEX_FILE} names {len(missing)} shard(s) that are not there: "
            f"{', '.join(missing[:4])}. Download them."
        )
    return files
