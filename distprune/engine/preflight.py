"""Everything that can be known to be wrong before a weight is read."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from distprune.budgets import Target, target_of
from distprune.calibration import Calibration, load_tokenizer, open_calibration, tokenizer_fingerprint
from distprune.checkpoint import (
    Checkpoint,
    HubModel,
    check_free_space,
    find_on_hub,
    is_hub_id,
    open_on_hub,
    partial_directory,
    prepare_output,
    resolve_model,
)
from distprune.config import PruneConfig
from distprune.errors import InputError
from distprune.families import Family, family_of
from distprune.methods import Method, make_method
from distprune.modeling import PrunedConfig
from distprune.version import __version__

BYTES_OF_FLOAT32 = 4
#: Layers whose gradients lie in the journal at once, as long as profiles take no longer than passes.
GRADIENTS_KEPT = 2


@dataclass(frozen=True)
class Job:
    """A run whose input has been found sound: what to prune, how and to what size."""

    config: PruneConfig
    model_path: Path  # of a hub model, perhaps without its weights
    hub: HubModel | None
    checkpoint: Checkpoint
    family: Family
    dense: PrunedConfig
    method: Method
    target: Target

    @property
    def needs_gradients(self) -> bool:
        """Whether there is a gradient pass."""
        return needs_gradients(self.method, self.dense)

    def whole_folder(self) -> Path:
        """The model's folder with its weights, which a hub model's are fetched into."""
        return self.hub.fetch_all() if self.hub else self.model_path

    def identity(self, device: str) -> dict[str, Any]:
        """All that decides the bytes of the result on one kind of device, as JSON would give it back."""
        texts = self.config.calibration, self.config.distill and self.config.distill.calibration
        calibration, distillation = (path and open_calibration(path).fingerprint for path in texts)
        return self.config.decisive() | {
            "distprune": __version__,
            # A commit is known where nothing of it is on this machine but headers.
            "model": f"{self.hub.repository}@{self.hub.commit}" if self.hub else self.checkpoint.fingerprint(),
            "calibration": calibration,
            "distillation text": distillation,
            "options": self.method.model_dump(mode="json"),
            "device": device,
        }


def check_job(config: PruneConfig) -> Job:
    """Validate a run from its configuration, the checkpoint's headers and the calibration set's metadata.

    Raises:
        InputError: names what is wrong and how to mend it. Nothing has been written by then.
    """
    check_paths(config)
    prepare_output(config.output, config.overwrite)
    method = make_method(config.method, config.options)
    hub, checkpoint = open_model(config)
    model_path = checkpoint.path
    family = family_of(checkpoint.config)
    dense = family.dense_config(checkpoint.config)
    check_tensors(checkpoint, family, dense)
    target = target_of(config, dense)
    method.check_target(target, config.align)
    texts = config.calibration, config.distill and config.distill.calibration
    for path in filter(None, texts):
        tokenizer = load_tokenizer(model_path, config.trust_remote_code)
        check_calibration(open_calibration(path), tokenizer, model_path, dense)
    if config.distill:
        check_can_be_split(config, texts)
    if needs_gradients(method, dense):
        check_has_targets(config)
    there = folder_size(partial_directory(config.output))
    check_free_space(config.output, space_needed(config, checkpoint, dense, method) - there)
    return Job(config, model_path, hub, checkpoint, family, dense, method, target)


def check_paths(config: PruneConfig) -> None:
    """See that every path is UTF-8: Ray passes on no others."""
    paths = {"model": config.model, "output": config.output, "calibration": config.calibration}
    for name, path in (paths | {"distill-calibration": config.distill and config.distill.calibration}).items():
        shown = os.fsencode(path or "").decode(errors="backslashreplace")
        if path and shown != str(path):
            raise InputError(f"{name} {shown}: is not UTF-8, and Ray can't pass it on. Rename it, or choose another.")


def open_model(config: PruneConfig) -> tuple[HubModel | None, Checkpoint]:
    """The checkpoint, of a hub model with no more than its headers unless every node is to read one folder.

    Raises:
        InputError: no such model, or none that can be pruned or come by in the way asked for.
    """
    trust = config.trust_remote_code
    if is_hub_id(config.model):
        hub = find_on_hub(config.model, config.revision)
        return hub, Checkpoint.open(hub.fetch_all(), trust) if config.weights == "shared" else open_on_hub(hub, trust)
    if config.weights == "hub":
        raise InputError(f"--weights hub: {config.model} is no hub id. Leave the option out, or give the model's id.")
    return None, Checkpoint.open(resolve_model(config.model, revision=config.revision).absolute(), trust)


def check_can_be_split(config: PruneConfig, texts: tuple[Path | None, Path | None]) -> None:
    """See that distillation has a sample to learn from and one to hold out."""
    path = texts[1] or texts[0]
    samples = config.samples if path is None else len(open_calibration(path).tokens)
    if samples < 2:
        raise InputError(
            f"{path or 'the own samples'}: distillation holds samples out, so it needs 2 or more; there is {samples}. "
            "Give --distill-calibration a larger set, or leave --distill out."
        )


def needs_gradients(method: Method, dense: PrunedConfig) -> bool:
    return bool(method.gradient_moments(dense.dense_shape()))


def check_has_targets(config: PruneConfig) -> None:
    """See that the loss that gradients are of has a next token to predict."""
    if config.calibration is not None and open_calibration(config.calibration).tokens.shape[1] < 2:
        raise InputError(
            f"{config.calibration}: method {config.method} needs the gradients of the next token's loss, and windows "
            "of one token have none. Make it again with a longer --sequence-length."
        )


def space_needed(config: PruneConfig, checkpoint: Checkpoint, dense: PrunedConfig, method: Method) -> int:
    """Bytes that a run may come to hold in its work folder."""
    # Parts and the shards merged from them lie side by side for a moment.
    weights = 2 * sum(info.nbytes for info in checkpoint.tensors.values())
    tokens = config.samples * config.sequence_length
    if config.calibration is not None:
        tokens = open_calibration(config.calibration).tokens.size
    # Of every block hidden states wait there, and those of one layer more while they are replaced; for gradients, those
    # of every layer and of the model's end, with the gradients of some. So do profiles.
    layers = dense.num_hidden_layers
    blocks = -(-layers // config.block_length(layers))
    states = layers + 1 + GRADIENTS_KEPT if needs_gradients(method, dense) else blocks + 1
    profiles = sum(method.profile_bytes(dense.hidden_size, dense.layer_shape(index)) for index in range(layers))
    return weights + states * tokens * dense.hidden_size * BYTES_OF_FLOAT32 + profiles


def folder_size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def check_tensors(checkpoint: Checkpoint, family: Family, dense: PrunedConfig) -> None:
    """See that the checkpoint holds just the tensors, in the shapes, that its configuration asks for."""
    checkpoint.check_shapes(family.tensor_shapes(dense))
    unknown = family.unknown_tensors(checkpoint.tensors, dense)
    if unknown:
        raise InputError(
            f"{checkpoint.tensors[unknown[0]].file}: holds tensor '{unknown[0]}', for which a "
            f"{family.model_type} model with this config.json has no place ({len(unknown)} such tensors). "
            "Merge adapters and remove extra heads before pruning."
        )


def check_calibration(
    calibration: Calibration, tokenizer: PreTrainedTokenizerBase, model_path: Path, dense: PrunedConfig
) -> None:
    """See that the calibration set was made for this model and fits its context."""
    fingerprint = tokenizer_fingerprint(tokenizer)
    calibration.check_matches(fingerprint, dense.vocab_size, str(model_path))
    length = calibration.tokens.shape[1]
    if length > dense.max_position_embeddings:
        raise InputError(
            f"{calibration.path}: its windows of {length} tokens exceed the model's context of "
            f"{dense.max_position_embeddings}. Make it again with a shorter --sequence-length."
        )
