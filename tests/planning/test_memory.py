"""Peak memory, against tensors counted while they live in the real tasks."""

from __future__ import annotations

import weakref

import pytest
import torch
from kinds_of_methods import OF_ALL_MODELS
from small_models import small_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distprune.checkpoint import Checkpoint
from distprune.config import PruneConfig
from distprune.engine.run.preflight import dense_model
from distprune.engine.worker.gate_tasks import CloseGated, OpenGated, OpenGatedBackward
from distprune.engine.worker.layer_worker import LayerWorker
from distprune.engine.worker.pass_tasks import Backward, CloseLayer, OpenBackward, OpenForward, Sweep
from distprune.engine.worker.prune_task import Prune
from distprune.planning import Cluster
from distprune.planning.memory import task_peaks
from distprune.planning.rehearsal import CloseAfterForward
from distprune.planning.scenario import make_scenario

BATCHES = 4


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of tensors that operations make, for as long as they live."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {id(tensor.untyped_storage()) for tensor in tensors_in((args, kwargs))}
        if function._can_decompose():
            with self:
                return function.decompose(*args, **(kwargs or {}))
        result = function(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            storage = tensor.untyped_storage()
            if id(storage) not in given | self._known:
                self._known.add(id(storage))
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._forget, id(storage), storage.nbytes())
        return result

    def _forget(self, storage: int, size: int) -> None:
        self._known.discard(storage)
        self.live -= size


def tensors_in(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta"]


@pytest.fixture(scope="session")
def wide(tmp_path_factory):
    """A Llama that is wide enough for activations and statistics to outweigh what is small."""
    folder = tmp_path_factory.mktemp("wide")
    sizes = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 3, "vocab_size": 1000}
    small_model(**sizes).to(torch.bfloat16).save_pretrained(folder)
    return folder


def planned_run(folder, method: str, **options):
    settings = {"sparsity": 0.3, "samples": 4 * BATCHES, "sequence_length": 32, "micro_batch": 4, "dtype": "bfloat16"}
    config = PruneConfig(model=str(folder), output="pruned", method=method, **settings | options)
    return make_scenario(config, Checkpoint.open(folder), Cluster(cpus=1), "cpu", {})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", OF_ALL_MODELS)
def test_the_peaks_of_all_tasks_are_those_of_the_tasks_themselves(wide, method):
    scenario = planned_run(wide, method)
    index, shape = 1, scenario.shapes[1]
    worker = LayerWorker(scenario.config, dense_model(Checkpoint.open(wide)), torch.device("cpu"))
    states = torch.randn(4 * BATCHES, 32, 256).bfloat16()
    worker.runner.shell.calls(4, 32, torch.bfloat16)
    found, weights = {}, scenario.stored_bytes[index]  # which are not made but read

    def do(task, name=None):
        counted.peak = counted.live
        result = task.run(worker)
        found[name or type(task)] = counted.peak + weights
        return result

    with LiveTensors() as counted:
        do(OpenForward(index))
        do(Sweep(index, 0, states))
        profile, _ = do(CloseLayer(index, 1), CloseAfterForward if scenario.needs_gradients else CloseLayer)
        if scenario.needs_gradients:
            do(OpenBackward(index))
            do(Backward(index, 0, states, states))
            profile, _ = do(CloseLayer(index, 1))
    with LiveTensors() as counted:
        do(Prune(index, states, shape, profile, {}, True))
    takes = scenario.rehearsal.layer(index)
    for task, peak in found.items():
        planned = takes[task].on(4 * BATCHES, lambda done: done.counts.peak.get("cpu", 0))
        # LAPACK's own workspace, which the plan counts, is not seen here.
        assert 0.85 * peak - 2**18 <= planned <= 1.25 * peak + 2**20, task


def test_the_peaks_of_a_step_in_which_gates_learn_are_those_of_its_tasks(wide):
    scenario = planned_run(wide, "flop", options={"batch": 4 * BATCHES})
    index, method = 1, scenario.method
    worker = LayerWorker(scenario.config, dense_model(Checkpoint.open(wide)), torch.device("cpu"))
    states = torch.randn(4 * BATCHES, 32, 256).bfloat16()
    for runner in (worker.runner, worker.gate_runner):
        runner.shell.calls(runner.micro_batch, 32, torch.bfloat16)
    OpenForward(index).run(worker)
    Sweep(index, 0, states).run(worker)
    profile, _ = CloseLayer(index, 1).run(worker)
    gates = {name: profile[name] for name in method.even_profile(scenario.architecture.dense_shape(index))}
    takes, weights = scenario.rehearsal.gate_learning(index), scenario.stored_bytes[index]
    for opening, passing, closing in (
        (OpenGated(index, profile, gates), Sweep(index, 0, states), CloseLayer(index, 1)),
        (OpenGatedBackward(index, profile, gates), Backward(index, 0, states, states), CloseGated(index, 1)),
    ):
        with LiveTensors() as counted:
            for task in (opening, passing, closing):
                counted.peak = counted.live
                task.run(worker)
                planned = takes[type(opening)][type(task)].on(4 * BATCHES, lambda done: done.counts.peak.get("cpu", 0))
                peak = counted.peak + weights
                assert 0.85 * peak - 2**18 <= planned <= 1.25 * peak + 2**20, task


def test_a_smaller_micro_batch_needs_less(wide):
    large, little = (task_peaks(planned_run(wide, "olica", micro_batch=size))["sweep"].host for size in (16, 1))
    assert little < large


def test_on_gpus_the_layer_lies_there_and_the_whole_model_nowhere(plan, headers_70b):
    gpus = plan(headers_70b, Cluster(gpus=8), method="magnitude").memory
    cpus = plan(headers_70b, method="magnitude").memory
    layer = 855_654_400 * 2
    assert layer < gpus.worker_device < 10 * layer
    assert cpus.worker_device == cpus.gpu == 0
    assert cpus.worker_resident > 70e9 * 2  # the model writes its own calibration set there
    assert gpus.worker_resident < 20e9


@pytest.mark.parametrize("method", ["oops", "slimgpt"])
def test_what_is_offloaded_lies_on_the_host_and_not_on_the_gpu(plan, headers_70b, method):
    given = {"method": method, "samples": 16, "sequence_length": 512}
    whole, offloaded = (
        plan(headers_70b, Cluster(gpus=1), offload=offload, **given).memory for offload in (False, True)
    )
    assert offloaded.worker_device < 4 * 855_654_400 * 2 < whole.worker_device
    assert offloaded.worker_resident > whole.worker_resident


def test_workers_that_share_a_gpu_add_up(plan, headers_70b):
    alone = plan(headers_70b, Cluster(gpus=1), method="magnitude").memory
    shared = plan(headers_70b, Cluster(gpus=1), method="magnitude", gpus_per_worker=0.5).memory
    assert shared.gpu == pytest.approx(2 * alone.gpu)


def test_every_block_keeps_its_input_on_disk(plan, headers_70b):
    # Windows so long that hidden states outweigh the checkpoint.
    options = {"method": "magnitude", "samples": 512, "sequence_length": 8192}
    relay, parallel = (plan(headers_70b, propagation=length, **options).memory.disk for length in ("full", 1))
    assert parallel - relay > 70 * 512 * 8192 * 8192 * 2
