"""Pruned checkpoints made of a model and edits of its layers, without a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from layer_edits import Edit, unchanged
from mixture_edits import add_to_router
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from distprune.export.output_config import Layout, modeling_files, output_config, plainest_layout
from distprune.layers.architecture import Architecture
from distprune.layers.module import said_shape


@dataclass(frozen=True)
class PrunedCheckpoint:
    """A folder, what layout it is in, and the dense model that computes the same."""

    folder: Path
    layout: Layout
    oracle: PreTrainedModel


@torch.no_grad()
def write_pruned(
    model: PreTrainedModel, edits: Mapping[int, Edit], folder: Path, layout: Layout | None = None
) -> PrunedCheckpoint:
    """Prune a dense model, which becomes the oracle, into a folder; in the plainest layout unless one is given."""
    architecture, state = Architecture(model.config), model.state_dict()
    path = language_model_path(model, architecture)
    written = {name: tensor for name, tensor in state.items() if f"{path}{architecture.layers_path}." not in name}
    if architecture.is_tied:
        written.pop(path + architecture.head_name, None)
    dense, said = {}, []
    for index in range(architecture.num_layers):
        prefix = path + architecture.layer_prefix(index)
        own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        pruned, same = edits.get(index, unchanged)(architecture.layer_from_state(index, own))
        names = architecture.names(index)
        written |= {prefix + name: tensor for name, tensor in names.state_of(pruned).items()}
        dense |= {prefix + name: tensor for name, tensor in names.state_of(same).items()}
        said.append(said_shape(architecture, index, pruned))
    fill_oracle(model, dense)
    folder.mkdir(parents=True, exist_ok=True)
    layout = layout or plainest_layout(architecture, said)
    config = output_config(architecture, model.config, said, layout)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for name, text in modeling_files(layout).items():
        (folder / name).write_text(text)
    save_file(
        {name: t.contiguous().clone() for name, t in written.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    return PrunedCheckpoint(folder, layout, model.eval())


def save_as_made(model: PreTrainedModel, folder: Path) -> None:
    """Save a model as transformers does one that it has made and not loaded: as checkpoints of its family are stored,
    which for most mixtures of experts is with tensors of their own for each expert."""
    made = type(model)(model.config)
    made.load_state_dict(model.state_dict())
    made.save_pretrained(folder)


def fill_oracle(model: PreTrainedModel, state: dict[str, Tensor]) -> None:
    """Give a dense model the weights, and the biases and branches that its class doesn't know."""
    for name in model.load_state_dict(state, strict=False).unexpected_keys:
        path, _, own = name.rpartition(".")
        if own == "bias" and not isinstance(model.get_submodule(path), nn.Linear):
            add_to_router(model.get_submodule(path), state[name])
        elif own == "bias":
            model.get_submodule(path).bias = nn.Parameter(state[name], requires_grad=False)
        elif path.endswith("left.branch"):
            ffn = model.get_submodule(path.removesuffix(".left.branch"))
            matrix = state[name] @ state[name.replace(".left.", ".right.")]
            ffn.register_forward_hook(lambda _, given, output, matrix=matrix: output + given[0] @ matrix.T)


def language_model_path(model: PreTrainedModel, architecture: Architecture) -> str:
    """What stands before the names of the language model's tensors, where it is a part of the model."""
    decoder = model.get_decoder()
    own = next(name for name, each in model.named_modules() if each is decoder)
    standing_alone = architecture.layers_path.rpartition(".")[0]
    return own.removesuffix(standing_alone)
