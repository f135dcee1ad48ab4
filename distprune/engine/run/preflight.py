"""Everything that can be known to be wrong before a weight is read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from upath import UPath

from distprune.budgets import StoredSizes, Target, target_of
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
    refuse_revision,
    resolve_model,
)
from distprune.config import PruneConfig
from distprune.engine.run.held_out import check_can_hold_out
from distprune.engine.run.left_alone import LeftAlone, left_alone
from distprune.engine.run.library import Library
from distprune.engine.worker.dense_model import DenseModel
from distprune.errors import InputError
from distprune.families.disk_names import disk_names
from distprune.families.language_model import language_config
from distprune.families.tied import UNTIED, differ_though_tied, untied
from distprune.hardware import AUTO, ComputeDtype, compute_dtype
from distprune.latency import LatencyTable
from distprune.layers.architecture import Architecture
from distprune.layers.module import empty_model
from distprune.layers.shapes import ExpertsShape
from distprune.methods import METHODS, Method, make_method
from distprune.methods.gated import GatedMethod
from distprune.search import STEPS
from distprune.storage import Location, is_remote, is_url, location
from distprune.version import __version__

#: Layers whose gradients lie in the journal at once, as long as profiles take no longer than passes.
GRADIENTS_KEPT = 2
#: Shards that workers merge at once, at most: so many lie on the disk beside the parts that they are made of.
MERGED_AT_ONCE = 16
#: What a library takes, as a multiple of the model: steps from the whole of every part to nothing.
LIBRARY_SHARE = (STEPS - 1) / 2
#: Rows of the matrices that torch multiplies for several experts at once are multiples of so many bytes.
ROW_BYTES = 16


@dataclass(frozen=True)
class Job:
    """A run whose input has been found sound: what to prune, how and to what size."""

    config: PruneConfig
    model_path: Path  # of a hub model, perhaps without its weights
    hub: HubModel | None
    model: DenseModel
    method: Method
    target: Target
    left_alone: LeftAlone
    notes: tuple[str, ...] = ()  # what the run says of itself
    library: Library | None = None  # that all parts are taken from

    @property
    def checkpoint(self) -> Checkpoint:
        return self.model.checkpoint

    @property
    def architecture(self) -> Architecture:
        return self.model.architecture

    @property
    def needs_gradients(self) -> bool:
        """Whether there is a gradient pass."""
        return needs_gradients(self.method, self.architecture)

    @property
    def learns_gates(self) -> bool:
        """Whether there is a stage in which gates learn."""
        return learns_gates(self.method, self.config)

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype of the checkpoint's weights."""
        return stored_dtype(self.model)

    def computed_in(self, dtype: ComputeDtype) -> Job:
        """The same run, its configuration's dtype settled."""
        return replace(self, config=self.config.model_copy(update={"dtype": dtype.name}))

    def whole_folder(self) -> Path:
        """The model's folder with its weights, which a hub model's are fetched into."""
        return self.hub.fetch_all() if self.hub else self.checkpoint.whole_folder()

    def identity(self, device: str) -> dict[str, Any]:
        """All that decides the bytes of the result on one kind of device, as JSON would give it back.

        The dtype is among it, so it has to be settled: a run never resumes in another one.
        """
        return identity_of(self.config, self.model_identity, device)

    @property
    def model_identity(self) -> str:
        """What tells the model from every other."""
        return model_identity(self.hub, self.checkpoint)


def identity_of(config: PruneConfig, model: str, device: str) -> dict[str, Any]:
    """The identity of a run; see :meth:`Job.identity`.

    Args:
        config: the run, its dtype settled.
        model: what tells its model from every other; see :func:`model_identity`.
        device: the kind of device that its workers are on.
    """
    calibration, distillation, held_out = (path and open_calibration(path).fingerprint for path in texts_of(config))
    latencies = config.latency_table and LatencyTable.read(config.latency_table).fingerprint
    return config.decisive() | {
        "distprune": __version__,
        "model": model,
        "calibration": calibration,
        "distillation text": distillation,
        "search text": held_out,
        "library": config.from_library and Library.read(config.from_library).fingerprint,
        "latencies": latencies,
        "options": make_method(config.method, config.options).model_dump(mode="json"),
        "device": device,
    }


def model_identity(hub: HubModel | None, checkpoint: Checkpoint) -> str:
    """What tells a model from every other; a commit is known where nothing of it is on this machine but headers."""
    return f"{hub.repository}@{hub.commit}" if hub else checkpoint.fingerprint()


def check_job(config: PruneConfig) -> Job:
    """Validate a run from its configuration, the checkpoint's headers and the calibration set's metadata.

    Raises:
        InputError: names what is wrong and how to fix it. Nothing has been written by then.
    """
    check_paths(config)
    check_apart(config)
    prepare_output(config.output, config.overwrite)
    method = make_method(config.method, config.options)
    hub, stored = open_model(config)
    model_path, model = stored.path, dense_model(stored)
    if config.experts_at_once is not None:
        check_takes_chunks(config, method, model)
    texts = texts_of(config)
    for path in filter(None, texts):
        tokenizer = load_tokenizer(model_path, config.trust_remote_code)
        check_calibration(open_calibration(path), tokenizer, model_path, model.architecture)
    if config.distill:
        check_keeps_zeros(method)
        check_can_be_split(config, texts)
    check_search(config, method)
    library = open_library(config, model_identity(hub, stored))
    if needs_gradients(method, model.architecture):
        check_has_targets(config)
    elif config.rounds > 1:
        raise InputError(
            f"--rounds {config.rounds}: method {method.name} goes by no gradients, so a further round would find what "
            "the first has found. Leave it out, or choose a method that does, such as curvature."
        )
    # The one check that may read weights, so after the others.
    is_untied = differ_though_tied(model.architecture.model, stored, model.names)
    if is_untied:
        model = dense_model(untied(stored))
    check_rows_of_experts(config, model)
    target = target_of(config, model.architecture, stored_sizes(model))
    method.check_target(target, config.align)
    there = folder_size(partial_directory(config.output))
    check_free_space(config.output, space_needed(config, model, method) - there)
    left = left_alone(model)
    notes = (
        *stored.notes,
        *((UNTIED,) if is_untied else ()),
        *((str(left),) if left.parts else ()),
        *((zeroed_note(method, config.sparsity),) if method.zeroes else ()),
        *(
            (f"Latencies are those of {config.latency_table}: {target.latencies.conditions}.",)
            if target.latencies
            else ()
        ),
    )
    return Job(config, model_path, hub, model, method, target, left, notes, library)


def texts_of(config: PruneConfig) -> tuple[Location | None, Location | None, Location | None]:
    """The calibration sets of the pruning, of distillation and of the search, where a run is given them."""
    return (
        config.calibration,
        config.distill.calibration if config.distill else None,
        config.search.calibration if config.search else None,
    )


def check_search(config: PruneConfig, method: Method) -> None:
    """See that a plan can be refined by a search, if it is asked for.

    Raises:
        InputError: it can't.
    """
    if config.search is None:
        if config.library is not None:
            raise InputError(f"--library {config.library}: it is a search that makes a library. Give --search too.")
        return
    if not method.has_menus:
        able = ", ".join(sorted(name for name, each in METHODS.items() if each.has_menus))
        raise InputError(
            f"--search: method {method.name} has no other plans to offer. Choose one of the methods {able}."
        )
    if config.layout == "stock":
        raise InputError(
            "--search: with --layout stock all layers are alike, so there is nothing to shift. Leave one out."
        )
    if config.experts_at_once is not None:
        raise InputError(
            f"--experts-at-once {config.experts_at_once}: a search needs all experts of a layer at once. Leave one out."
        )
    samples = config.samples if config.calibration is None else len(open_calibration(config.calibration).tokens)
    check_can_hold_out(config, samples)


def open_library(config: PruneConfig, model: str) -> Library | None:
    """The library that all parts are taken from, if any are.

    Args:
        model: what tells the model from every other.

    Raises:
        InputError: it can't be taken from.
    """
    if (folder := config.from_library) is None:
        return None
    library = Library.read(folder)
    if library.model != model:
        raise InputError(
            f"{folder}: is the library of another model than {config.model}. Give the model that it is of."
        )
    if config.search or config.rounds > 1:
        raise InputError(f"--from-library {folder}: solves nothing, so --search and --rounds do not go with it.")
    if config.distill and config.distill.calibration is None:
        raise InputError("--distill: a library holds no text to learn from. Give --distill-calibration.")
    return library


def check_keeps_zeros(method: Method) -> None:
    """See that distillation would not fill weights that the method has set to zero.

    Raises:
        InputError: it would.
    """
    if method.zeroes:
        raise InputError(
            f"--distill: method {method.name} with these options sets weights to zero, and distillation would train "
            "them away from it. Leave out --distill, or let the method remove units."
        )


def zeroed_note(method: Method, sparsity: float) -> str:
    """What a run says of itself whose method zeroes weights."""
    return (
        f"Method {method.name} sets {sparsity:.1%} of the weights of attention and feed-forward networks to zero and "
        "removes none: all matrices keep their size, and the checkpoint is as large as the original."
    )


def check_takes_chunks(config: PruneConfig, method: Method, model: DenseModel) -> None:
    """See that a run can do with some of a mixture's experts at a time.

    Raises:
        InputError: it can't.
    """
    option = f"--experts-at-once {config.experts_at_once}"
    if not any(isinstance(shape.ffn, ExpertsShape) for shape in model.architecture.dense_shapes):
        kind = model.architecture.config.model_type
        raise InputError(f"{option}: distprune knows no mixture of experts in this {kind} model. Leave it out.")
    if not method.takes_chunks:
        able = ", ".join(sorted(name for name, each in METHODS.items() if each.takes_chunks))
        raise InputError(
            f"{option}: method {method.name} needs all experts of a layer at once. Leave it out, or choose one of the "
            f"methods {able}."
        )
    if config.rounds > 1:
        raise InputError(f"{option}: further rounds need all experts of a layer at once. Leave one of them out.")
    if config.distill:
        raise InputError(f"{option}: distillation needs all experts of a layer at once. Leave one of them out.")


def dense_model(checkpoint: Checkpoint) -> DenseModel:
    """The language model of a checkpoint, every tensor that it needs there in the shape that it needs.

    Raises:
        InputError: transformers has no such model, or a tensor is missing or has another shape.
    """
    config, _ = language_config(checkpoint.config)
    architecture = Architecture(config)
    return DenseModel(architecture, disk_names(empty_model(architecture), checkpoint), checkpoint)


def check_rows_of_experts(config: PruneConfig, model: DenseModel) -> None:
    """Refuse widths of experts that torch's grouped products, by which transformers runs them, can't take."""
    architecture = model.architecture
    kinds = {type(shape.ffn) for shape in architecture.dense_shapes}
    dtypes = (stored_dtype(model), getattr(torch, config.dtype, torch.float32))
    unit = ROW_BYTES // min(dtype.itemsize for dtype in dtypes)
    if ExpertsShape in kinds and config.align % unit:
        raise InputError(
            f"align is {config.align}: torch multiplies the experts of {architecture.config.model_type} in rows of "
            f"multiples of {ROW_BYTES} bytes, so their widths must be multiples of {unit} here. Set --align {unit} or "
            "a multiple of it."
        )


def stored_dtype(model: DenseModel) -> torch.dtype:
    """The dtype of a checkpoint's weights, by its embedding."""
    return model.embedding_dtype


def stored_sizes(model: DenseModel) -> StoredSizes:
    """How large the numbers of a checkpoint's tensors are."""
    tensors = model.checkpoint.tensors
    layers = tuple(
        {name: dtype.itemsize for name, dtype in model.stored_dtypes(index).items()}
        for index in range(model.architecture.num_layers)
    )
    return StoredSizes(layers, sum(tensors[name].nbytes for name in model.outer_names()))


def check_apart(config: PruneConfig) -> None:
    """See that neither the output nor the folder that it is made in is, holds or lies in something that is read.

    Links are followed: what counts is where things lie.

    Raises:
        InputError: one of them does; names both.
    """
    model = location(config.model) if is_url(config.model) else Path(config.model).expanduser()
    read = {
        "the model": None if is_hub_id(config.model) else model,
        "the calibration set": config.calibration,
        "distillation's calibration set": texts_of(config)[1],
        "the search's calibration set": texts_of(config)[2],
        "the latency table": config.latency_table,
        "the library": config.library or config.from_library,
    }
    for what, path in read.items():
        for folder in (config.output, partial_directory(config.output)):
            if path is not None and overlap(path, folder):
                raise InputError(
                    f"{config.output}: a run writes there and to {partial_directory(config.output)}, and one of these "
                    f"is, holds or lies in {what} ({path}). Choose an output elsewhere."
                )


def overlap(path: Path | UPath, folder: Path | UPath) -> bool:
    """Whether one is the other or lies somewhere inside it, links followed."""
    if is_remote(path) or is_remote(folder):
        one, other = f"{path}/", f"{folder}/"
        return one.startswith(other) or other.startswith(one)
    one, other = path.resolve(), folder.expanduser().resolve()
    return one == other or one in other.parents or other in one.parents


def check_paths(config: PruneConfig) -> None:
    """See that every path is UTF-8: Ray passes on no others."""
    paths = {"model": config.model, "output": config.output, "calibration": config.calibration}
    paths |= {"latency-table": config.latency_table, "library": config.library, "from-library": config.from_library}
    _, paths["distill-calibration"], paths["search-calibration"] = texts_of(config)
    for name, path in paths.items():
        shown = os.fsencode(str(path or "")).decode(errors="backslashreplace")
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
    if is_url(config.model):
        refuse_revision(config.model, config.revision)
        return None, Checkpoint.open(location(config.model), trust)
    return None, Checkpoint.open(resolve_model(config.model, revision=config.revision).absolute(), trust)


def check_can_be_split(config: PruneConfig, texts: Sequence[Location | None]) -> None:
    """See that distillation has a sample to learn from and one to hold out."""
    path = texts[1] or texts[0]
    samples = config.samples if path is None else len(open_calibration(path).tokens)
    if samples < 2:
        raise InputError(
            f"{path or 'the own samples'}: distillation holds samples out, so it needs 2 or more; there is {samples}. "
            "Give --distill-calibration a larger set, or leave --distill out."
        )


def needs_gradients(method: Method, architecture: Architecture) -> bool:
    """Whether a method asks for the loss's gradients, of any layer."""
    return any(method.gradient_moments(shape) for shape in architecture.dense_shapes)


def learns_gates(method: Method, config: PruneConfig) -> bool:
    """Whether a run has a stage in which gates learn."""
    return isinstance(method, GatedMethod) and config.sparsity > 0


def check_has_targets(config: PruneConfig) -> None:
    """See that the loss that gradients are of has a next token to predict."""
    if config.calibration is not None and open_calibration(config.calibration).tokens.shape[1] < 2:
        raise InputError(
            f"{config.calibration}: method {config.method} needs the gradients of the next token's loss, and windows "
            "of one token have none. Make it again with a longer --sequence-length."
        )


def space_needed(config: PruneConfig, model: DenseModel, method: Method) -> int:
    """Bytes that a run may come to hold in its work folder: profiles to the end, and the most that lies there beside
    them when gradients, pruned layers or the shards that these become are made."""
    architecture, tokens = model.architecture, config.samples * config.sequence_length
    if config.calibration is not None:
        tokens = open_calibration(config.calibration).tokens.size
    layers, hidden_size = architecture.num_layers, architecture.hidden_size
    weights = sum(info.nbytes for info in model.checkpoint.tensors.values())
    profiles = sum(method.profile_bytes(hidden_size, shape) for shape in architecture.dense_shapes)
    states = tokens * hidden_size * expected_itemsize(config, stored_dtype(model))
    # Of every layer and of the model's end, with the gradients of some; or of every layer or block, and one more.
    passing = (layers + 1 + GRADIENTS_KEPT) * states if needs_gradients(method, architecture) else 0
    is_aiming = any(map(method.aims_at_dense, architecture.dense_shapes))
    waiting = layers if is_aiming else -(-layers // config.block_length(layers))
    pruning = (waiting + 1) * states + weights
    if config.rounds > 1:
        passing += pruning
    if config.search:
        pruning += round(LIBRARY_SHARE * weights)
    # Parts and the shards that are made of them lie side by side for a moment.
    assembling = weights + min(weights, merged_at_once(config) * config.max_shard_size)
    return profiles + max(passing, pruning, assembling)


def merged_at_once(config: PruneConfig) -> int:
    """How many shards may be made of their parts at once."""
    return 1 if config.writes == "driver" else min(MERGED_AT_ONCE, config.worker_range()[1] or MERGED_AT_ONCE)


def expected_itemsize(config: PruneConfig, stored: torch.dtype) -> int:
    """Bytes of a number in hidden states, as far as can be told before the workers' hardware is known."""
    if config.dtype != AUTO:
        return getattr(torch, config.dtype).itemsize
    on_gpu = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    return stored.itemsize if on_gpu else compute_dtype(stored, "cpu").dtype.itemsize


def folder_size(folder: Path | UPath) -> int:
    """Bytes of the files in a folder; of an object store none, where room is no concern."""
    if is_remote(folder):
        return 0
    size = 0
    for file in folder.rglob("*"):
        # A worker of an interrupted run may still take its files away.
        with suppress(FileNotFoundError):
            size += file.stat().st_size if file.is_file() else 0
    return size


def check_calibration(
    calibration: Calibration, tokenizer: PreTrainedTokenizerBase, model_path: Path, architecture: Architecture
) -> None:
    """See that the calibration set was made for this model and fits its context."""
    fingerprint = tokenizer_fingerprint(tokenizer)
    calibration.check_matches(fingerprint, architecture.vocab_size, str(model_path))
    length = calibration.tokens.shape[1]
    if length > architecture.max_length:
        raise InputError(
            f"{calibration.path}: its windows of {length} tokens exceed the model's context of "
            f"{architecture.max_length}. Make it again with a shorter --sequence-length."
        )
