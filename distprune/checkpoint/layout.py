"""Which files make up a checkpoint folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from distprune.errors import InputError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
INDEX_SUFFIX = ".index.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_FILES = (ADAPTER_CONFIG_FILE, "adapter_model*")


def require_checkpoint(folder: Path) -> None:
    """Raise InputError unless `folder` holds a config.json and safetensors weights."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder. Give a Hugging Face checkpoint folder, or a .gguf file.")
    refuse_lone_adapter(folder)
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


def refuse_lone_adapter(folder: Path) -> None:
    """Raise InputError where `folder` holds an adapter and no model that it could belong to."""
    adapter = find_adapter(folder)
    has_weights = any(
        file.name not in adapter for pattern in ("*.safetensors", "pytorch_model*") for file in folder.glob(pattern)
    )
    if adapter and not ((folder / CONFIG_FILE).is_file() and (has_weights or (folder / INDEX_FILE).is_file())):
        raise InputError(
            f"{folder} holds nothing but an adapter ({', '.join(adapter)}), not a whole model. Merge it into its base "
            "model first (peft's merge_and_unload, then save_pretrained), and give the merged folder."
        )


def refuse_adapter(folder: Path) -> None:
    """Raise InputError where an adapter lies beside the model, which transformers would add to the weights."""
    if adapter := find_adapter(folder):
        raise InputError(
            f"{folder} holds an adapter ({', '.join(adapter)}) beside the full weights, which alone would be pruned. "
            "Merge it into them first (peft's merge_and_unload, then save_pretrained), or move its files away."
        )


def find_adapter(folder: Path) -> list[str]:
    """The names of the adapter's files that `folder` holds, sorted."""
    return sorted(file.name for pattern in ADAPTER_FILES for file in folder.glob(pattern))


def find_entry(folder: Path, is_there: Callable[[str], bool]) -> Path:
    """The file by which transformers opens a model's weights: the only weight file, or the index of several.

    That is the file that config.json names as its `transformers_weights`, else model.safetensors, else
    model.safetensors.index.json; so an index beside a model.safetensors counts for nothing. `is_there` tells whether
    the model has a file of some name. Where it has none of them, the answer is model.safetensors.

    InputError: the file that config.json names is not there.
    """
    named = read_json(folder / CONFIG_FILE).get("transformers_weights")
    if named is not None:
        if not isinstance(named, str) or PurePosixPath(named).name != named or not is_there(named):
            raise InputError(
                f"{folder / CONFIG_FILE} names {named!r} as its transformers_weights, and there is no such file beside "
                "it. Correct the entry, or remove it."
            )
        return folder / named
    single = is_there(WEIGHTS_FILE) or not is_there(INDEX_FILE)
    return folder / (WEIGHTS_FILE if single else INDEX_FILE)


def is_index(entry: Path) -> bool:
    """Whether weights are opened by the index of several files."""
    return entry.name.endswith(INDEX_SUFFIX)


def find_weight_files(folder: Path, entry: Path) -> list[Path]:
    """The folder's safetensors files, given what `find_entry` found: an index's shards, or the one weight file."""
    if is_index(entry):
        return _shards(entry)
    if entry.is_file():
        return [entry]
    files = sorted(folder.glob("*.safetensors"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:4])
        raise InputError(
            f"{folder} holds {len(files)} safetensors files ({names}, ...) but no {INDEX_FILE} "
            "that says what is in them. Download the index too, or write the model anew with save_pretrained."
        )
    return files


def read_weight_map(index: Path) -> dict[str, str]:
    """An index's tensor name -> shard file name."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{index} has no weight_map of tensor names to files. Download the file again.")
    return weight_map


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file that holds one object; InputError where it holds anything else, or is not there."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{file} is not there. Download the model again, or give another.") from error
    except ValueError as error:
        raise InputError(f"{file} is not valid JSON ({error}). Download the file again.") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} should hold a JSON object, not a {type(content).__name__}. Download the file again.")
    return content


def _shards(index: Path) -> list[Path]:
    files = [index.parent / name for name in sorted(set(read_weight_map(index).values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise InputError(
            f"{index} names {len(missing)} shard(s) that are not there: {', '.join(missing[:4])}. Download them."
        )
    return files
