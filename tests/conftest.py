"""What the tests are made of: a tiny tokenizer, tiny random models on disk, one Ray, and pruning runs on it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from local_s3 import serving_s3
from ray.actor import ActorHandle
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from distprune import prune
from distprune.calibration import CalibrationMetadata, load_tokenizer, tokenizer_fingerprint, write_calibration
from distprune.engine import RunRecord
from distprune.engine.scheduler.pool import Attempt, WorkerPool
from distprune.engine.scheduler.runtime import RayRuntime
from distprune.engine.worker.actor import Worker

STOP = RayRuntime.stop

#: They take torch's one place for devices from outside, which a process must give away before its first backward pass.
ON_A_PRETENDED_GPU = {"test_gpu_placement.py", "test_moments_on_gpu.py"}


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave those files to a run of what needs the machine to itself, and to one that names them."""
    named = any(collection_path.name in argument for argument in config.args)
    asked_for = config.option.markexpr.startswith("alone")
    return True if collection_path.name in ON_A_PRETENDED_GPU and not (named or asked_for) else None


#: No other file takes half as long.
LONGEST = {"test_real_model.py", "test_s3.py"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take long, those that start Ray, so that no process is left with one at the end.

    The real model starts and stops a Ray of its own, which a process can do before the tests' Ray has been started.
    """
    with_ray = {item.path for item in items if "ray_cluster" in getattr(item, "fixturenames", ())}
    items.sort(key=lambda item: (item.path.name not in LONGEST, item.path not in with_ray))


SENTENCES = [
    "The river runs down to the sea, and the sea sends rain back to the hills.",
    "A pruner takes away what a model can do without, and mends what is left.",
    "Below is an instruction. Write a response that completes the request.",
]

DECODER = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Threads only get in each other's way on models this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    # As Llama's does, it begins a text with a special token unless told not to.
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    # A short model_max_length: texts longer than it must neither be cut nor warned about.
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=16, bos_token="<s>", eos_token="</s>")


# ------------------------------------------------------------------ a model to sample from and to evaluate


@pytest.fixture(scope="session")
def model(tokenizer) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer) + 3,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def model_path(tmp_path_factory, model, tokenizer) -> Path:
    path = tmp_path_factory.mktemp("tiny-llama")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


# ------------------------------------------------------------------ models to prune


@pytest.fixture(scope="session")
def save_model(tmp_path_factory, tokenizer) -> Callable[..., Path]:
    """Saves a random decoder of four layers, with its tokenizer, and gives its folder."""

    def save(
        model_type: str = "llama", dtype: torch.dtype = torch.float32, max_shard_size: str = "1GB", **changes
    ) -> Path:
        path = tmp_path_factory.mktemp(model_type)
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        config = AutoConfig.for_model(model_type, vocab_size=len(tokenizer) + 3, **DECODER | ids | changes)
        randomized(AutoModelForCausalLM.from_config(config)).to(dtype).save_pretrained(
            path, max_shard_size=max_shard_size
        )
        tokenizer.save_pretrained(path)
        return path

    return save


def randomized(model: PreTrainedModel) -> PreTrainedModel:
    """Norms and biases are random too, so that a mistake in any of them shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.copy_(noise + 1 if "norm" in name else noise)
    return model.eval()


@pytest.fixture(scope="session")
def dense_path(save_model) -> Path:
    """A Llama in float32 with grouped-query attention."""
    return save_model()


@pytest.fixture(scope="session")
def calibrate(tmp_path_factory) -> Callable[[Path], Path]:
    """Eight random windows of sixteen tokens for a model that `save_model` made, written once for each folder."""

    @cache
    def write(model: Path) -> Path:
        path = tmp_path_factory.mktemp("calibration") / "calibration.arrow"
        vocabulary, length = AutoConfig.from_pretrained(model).get_text_config().vocab_size, 16
        tokens = np.random.default_rng(0).integers(vocabulary, size=(8, length), dtype=np.int32)
        fingerprint = tokenizer_fingerprint(load_tokenizer(model))
        write_calibration(path, tokens, CalibrationMetadata(fingerprint, vocabulary, length, ("random",), 0, False))
        return path

    return write


@pytest.fixture(scope="session")
def calibration_path(calibrate, dense_path) -> Path:
    return calibrate(dense_path)


# ------------------------------------------------------------------ runs


class Recycled:
    """Stands in for `Worker`: hands out actors that earlier runs have left, made anew with the new run's arguments.

    A worker keeps no state between calls, and importing torch takes a new process seconds.
    """

    def __init__(self):
        self.left: dict[tuple, list[ActorHandle]] = {}
        self.asked: dict[ActorHandle, tuple] = {}

    def options(self, **options) -> Recycled:
        # The node is another in another Ray, whose actors are of no use here.
        self.wanted = (ray.get_runtime_context().get_node_id(), *options.items())
        return self

    def remote(self, *arguments) -> ActorHandle:
        if left := self.left.get(self.wanted):
            worker = left.pop()
            worker.__ray_call__.remote(lambda self, *arguments: self.__init__(*arguments), *arguments)
        else:
            worker = Worker.options(**dict(self.wanted[1:])).remote(*arguments)
        self.asked[worker] = self.wanted
        return worker

    def take_back(self, workers: list[ActorHandle]) -> None:
        for worker in workers:
            self.left.setdefault(self.asked[worker], []).append(worker)


@pytest.fixture(scope="session")
def ray_cluster():
    """A Ray whose CPUs and two GPUs exist in its books alone; runs join it and share worker processes."""
    ray.init("local", num_cpus=6, num_gpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    with pytest.MonkeyPatch.context() as patch:
        recycled = Recycled()
        patch.setattr("distprune.engine.scheduler.runtime.Worker", recycled)
        patch.setattr(RayRuntime, "stop", lambda _, workers, __: recycled.take_back(workers))
        yield
    ray.shutdown()


@pytest.fixture
def new_workers(ray_cluster, monkeypatch):
    """Runs of this test start and end their own worker processes."""
    monkeypatch.setattr("distprune.engine.scheduler.runtime.Worker", Worker)
    monkeypatch.setattr(RayRuntime, "stop", STOP)


@pytest.fixture(scope="session")
def run(ray_cluster, dense_path, calibrate, tmp_path_factory) -> Callable[..., tuple[Path, RunRecord]]:
    """Prunes the Llama into a new folder, on one worker and the CPU unless told otherwise."""

    def prune_one(model: Path = dense_path, output: Path | None = None, **options) -> tuple[Path, RunRecord]:
        defaults = {"method": "olica", "device": "cpu", "workers": 1, "micro_batch": 3}
        if "calibration" not in options:
            defaults["calibration"] = calibrate(model)
        output = output or tmp_path_factory.mktemp("run") / "pruned"
        return output, prune(str(model), output, **{**defaults, **options})

    return prune_one


@pytest.fixture(scope="session")
def pruned(run) -> tuple[Path, RunRecord]:
    """The Llama at a sparsity of 0.3, in several shards, by one worker."""
    return run(sparsity=0.3, max_shard_size=60_000)


@pytest.fixture(scope="session")
def s3_environment():
    """An S3 on this machine; variables that say where it is, which this process has too."""
    pytest.importorskip("s3fs")
    with serving_s3() as environment:
        yield environment


@pytest.fixture(scope="session")
def digests() -> Callable[[Path], dict[str, str]]:
    """SHA-256 of every weight file and of config.json, by name."""

    def digest(folder: Path) -> dict[str, str]:
        files = [*folder.glob("*.safetensors"), *folder.glob("*.index.json"), folder / "config.json"]
        return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(files)}

    return digest


@pytest.fixture
def calls(monkeypatch) -> list[tuple[str, ActorHandle]]:
    """Kind of task and worker of every step of a call, in order; the runs' first waits until all workers are up."""
    made: list[tuple[str, ActorHandle]] = []
    start, init = WorkerPool._start, WorkerPool.__init__

    def init_and_wait(pool: WorkerPool, *arguments) -> None:
        init(pool, *arguments)
        ray.get(list(pool._starting))

    def note_and_start(pool: WorkerPool, attempt: Attempt) -> None:
        start(pool, attempt)
        made.append((attempt.task.kind(), attempt.worker))

    monkeypatch.setattr(WorkerPool, "__init__", init_and_wait)
    monkeypatch.setattr(WorkerPool, "_start", note_and_start)
    return made
