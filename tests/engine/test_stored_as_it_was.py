"""What a run makes of checkpoints that store more, or otherwise, than their configuration says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from distprune import inspect, load
from distprune.engine.telemetry.progress import Progress
from distprune.families import family_of
from distprune.layers.names import origin_of

EMBEDDING, HEAD, WEIGHTS = "model.embed_tokens.weight", "lm_head.weight", "model.safetensors"
TOKENS = torch.arange(2, 26)[None]


class Notes(Progress):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


@pytest.fixture
def restored(save_model, tmp_path):
    """A copy of a Llama of three layers that stores what a function makes of its tensors."""

    def store(change, **options) -> Path:
        folder = shutil.copytree(save_model(num_hidden_layers=3, **options), tmp_path / "model")
        save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})
        return folder

    return store


# ---------------------------------------------------------------- tied embeddings


def with_head(tensors):
    return tensors | {HEAD: tensors[EMBEDDING].flip(0).contiguous()}


def moved_to_the_head(tensors):
    return {HEAD if name == EMBEDDING else name: tensor for name, tensor in tensors.items()}


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    return load(folder).eval()(TOKENS).logits


@pytest.mark.parametrize(
    ("change", "untied"),
    [(with_head, True), (lambda t: t | {HEAD: t[EMBEDDING].clone()}, False), (moved_to_the_head, False)],
    ids=["a head of its own", "a copy", "the head alone"],
)
def test_nothing_removed_gives_the_logits_that_transformers_gives(prune_here, restored, tmp_path, change, untied):
    model, notes = restored(change, tie_word_embeddings=True), Notes()
    options = {"sparsity": 0.0, "distill": False, "layout": "stock", "method": "curvature", "progress": notes}
    record = prune_here(tmp_path / "pruned", model, **options)
    torch.testing.assert_close(logits(tmp_path / "pruned"), logits(model))
    assert json.loads((tmp_path / "pruned" / "config.json").read_text())["tie_word_embeddings"] != untied
    assert [("tie_word_embeddings: false" in note) for note in record.notes] == [True] * untied
    assert set(record.notes) <= set(notes.notes)
    assert inspect(tmp_path / "pruned").notes == record.notes


@torch.no_grad()
def test_an_untied_head_goes_through_a_run_of_every_stage(prune_here, restored, tmp_path):
    model = restored(with_head, tie_word_embeddings=True)
    record = prune_here(tmp_path / "pruned", model, method="curvature", distill={"objective": "logits", "batch": 2})
    dense, pruned = (load(folder).eval() for folder in (model, tmp_path / "pruned"))
    assert type(pruned).__name__ == "PrunedLlamaForCausalLM"
    assert not pruned.config.tie_word_embeddings
    assert torch.equal(pruned.lm_head.weight, dense.lm_head.weight)
    assert torch.equal(pruned.model.embed_tokens.weight, dense.model.embed_tokens.weight)
    assert record.total_parameters_before == sum(map(torch.numel, dense.parameters()))
    assert record.total_parameters_after == sum(map(torch.numel, pruned.parameters()))


def test_workers_that_are_served_find_the_embedding_in_the_heads_place(run, restored, digests):
    model = restored(moved_to_the_head, tie_word_embeddings=True)
    (served, _), (shared, _) = (run(model, sparsity=0.3, weights=way) for way in ("served", "shared"))
    assert digests(served) == digests(shared)
    # What was on disk under a name comes back under it.
    assert set(load_file(served / WEIGHTS)) >= {HEAD}


# ---------------------------------------------------------------- several dtypes in a layer


def norms_wide(name: str) -> torch.dtype:
    return torch.float32 if "norm" in name else torch.bfloat16


def norms_narrow(name: str) -> torch.dtype:
    return torch.bfloat16 if "norm" in name else torch.float32


def all_mixed(name: str) -> torch.dtype:
    dtypes = {"q_proj": torch.float16, "v_proj": torch.float32, "up_proj": torch.float32, "k_proj.bias": torch.float32}
    return next((dtype for part, dtype in dtypes.items() if part in name), torch.bfloat16)


def original_of(name: str, originals) -> str:
    """By checkpoint names: a tensor's own, or that of the matrix that it was made from."""
    if not name.startswith("model.layers."):
        return name
    layer, inner = name[: len("model.layers.0.")], name[len("model.layers.0.") :]
    assert layer.count(".") == 3
    return layer + origin_of(inner, {key.removeprefix(layer) for key in originals}, family_of("llama"))


FULL, LORA, LOGITS = {"batch": 2, "train": "full"}, {"batch": 2, "train": "lora"}, {"batch": 2, "objective": "logits"}


@pytest.mark.parametrize(
    ("dtype_of", "method", "distill"),
    [
        *((dtype_of, "curvature", False) for dtype_of in (norms_wide, norms_narrow)),
        *((all_mixed, method, False) for method in ("curvature", "olica", "oops", "flap", "slimgpt", "llm-pruner")),
        *((all_mixed, "olica", distill) for distill in (FULL, LORA, LOGITS)),
    ],
)
def test_every_tensor_keeps_the_dtype_that_it_was_stored_in(prune_here, restored, tmp_path, dtype_of, method, distill):
    def cast(tensors):
        return {name: tensor.to(dtype_of(name)) for name, tensor in tensors.items()}

    model = restored(cast, dtype=torch.bfloat16, attention_bias=True)
    prune_here(tmp_path / "pruned", model, method=method, distill=distill, max_shard_size=10**9)
    before, after = load_file(model / WEIGHTS), load_file(tmp_path / "pruned" / WEIGHTS)
    floating = {name: tensor for name, tensor in after.items() if tensor.is_floating_point()}
    assert {name: tensor.dtype for name, tensor in floating.items()} == {
        name: dtype_of(original_of(name, before)) for name in floating
    }
    assert load(tmp_path / "pruned")(TOKENS).logits.isfinite().all()


def test_what_is_stored_in_several_dtypes_is_pruned_like_the_same_numbers_in_one(prune_here, restored, tmp_path):
    model = restored(lambda tensors: {name: t.to(all_mixed(name)) for name, t in tensors.items()}, dtype=torch.bfloat16)
    single = shutil.copytree(model, tmp_path / "single")
    LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).save_pretrained(single)
    weights = []
    for name, folder in (("mixed", model), ("one", single)):
        prune_here(tmp_path / name, folder, distill=False, dtype="float32", propagation=1, max_shard_size=10**9)
        weights.append(load_file(tmp_path / name / WEIGHTS))
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name].to(tensor.dtype)), name


def test_a_target_in_bytes_counts_them_as_they_are_stored(prune_here, restored, tmp_path):
    def wide_ffn(tensors):
        return {name: t.to(torch.float32 if "mlp" in name else torch.bfloat16) for name, t in tensors.items()}

    model = restored(wide_ffn, dtype=torch.bfloat16)
    options = {"method": "curvature", "target": "bytes", "distill": False, "max_shard_size": 10**9, "align": 1}
    prune_here(tmp_path / "pruned", model, **options)
    sizes = [
        sum(t.nbytes for name, t in load_file(folder / WEIGHTS).items() if ".layers." in name and "pairs" not in name)
        for folder in (model, tmp_path / "pruned")
    ]
    assert 1 - sizes[1] / sizes[0] == pytest.approx(0.3, abs=0.004)
