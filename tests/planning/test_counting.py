"""What is counted on tensors without values, against torch's own count and against what is known of solves."""

from __future__ import annotations

import pytest
import torch
from small_models import small_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from distprune.layers.architecture import Architecture
from distprune.layers.runner import LayerRunner
from distprune.planning.as_with_values import AsWithValues
from distprune.planning.counting import Counting
from distprune.planning.imagined_gpu import IMAGINED_GPU
from distprune.planning.kernels import EIGEN, FLOAT32, FLOAT64, HALF, LINK


def counted(run):
    """What is counted of a function, on tensors without values."""
    with FakeTensorMode(), AsWithValues(), Counting() as counting:
        run()
    return counting.take()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_layer_counts_the_products_that_torch_counts(attention, monkeypatch):
    """The CPU's fused attention is not known to torch's counter, so that it is left out there."""
    monkeypatch.setattr("distprune.layers.tree.attention_kernel", lambda config: attention)
    model = small_model()
    architecture = Architecture(model.config)
    runner = LayerRunner(architecture, torch.device("cpu"), torch.float32, 2)
    prefix = architecture.layer_prefix(0)
    state = {name[len(prefix) :]: tensor for name, tensor in model.state_dict().items() if name.startswith(prefix)}
    layer, states = architecture.layer_from_state(0, state), torch.randn(6, 16, 64)
    runner.shell.calls(2, 16, torch.float32)
    with FlopCounterMode(display=False) as counter:
        runner.run(layer, 0, states)
    fused = 0 if attention == "eager" else 3 * 4 * 2 * 8 * 16 * 16 * 8
    with FakeTensorMode(allow_non_fake_inputs=True), Counting() as counting:
        runner.run(layer, 0, states)
    assert counting.take().flops(FLOAT32) == counter.get_total_flops() + fused > fused


@pytest.mark.parametrize(
    "solve, kind, flops",
    [
        (lambda a, b: torch.linalg.cholesky(a), FLOAT64, 30**3 / 3),
        (lambda a, b: torch.cholesky_inverse(a), FLOAT64, 2 * 30**3 / 3),
        (lambda a, b: torch.linalg.solve_triangular(a, b, upper=False), FLOAT64, 30**2 * 7),
        (lambda a, b: torch.cholesky_solve(b, a), FLOAT64, 2 * 30**2 * 7),
        (lambda a, b: torch.linalg.qr(b), FLOAT64, 4 * 30 * 7 * 7 - 4 / 3 * 7**3),
        (lambda a, b: torch.linalg.eigh(a), EIGEN, 9 * 30**3),
        (lambda a, b: torch.linalg.eigvalsh(a), EIGEN, 4 / 3 * 30**3),
        (lambda a, b: a.addmm_(b, b.mT), FLOAT64, 2 * 30 * 30 * 7),
        (lambda a, b: torch.mm(b.bfloat16(), b.bfloat16().mT), HALF, 2 * 30 * 30 * 7),
    ],
)
def test_solves_count_their_operations(solve, kind, flops):
    counts = counted(lambda: solve(torch.eye(30).double(), torch.randn(30, 7).double()))
    assert counts.flops(kind) == pytest.approx(flops)
    assert counts.flops(HALF, FLOAT32, FLOAT64, EIGEN) == counts.flops(kind)


def test_a_gpus_tensors_are_told_from_the_hosts():
    def there_and_back():
        there = torch.empty(1000).to(IMAGINED_GPU)
        return (there + 1).cpu()

    counts = counted(there_and_back)
    assert counts.bytes(LINK) == 8000
    assert counts.peak == {"cpu": 4000, "lazy": 8000}


def test_views_and_memory_that_is_not_filled_cost_nothing():
    counts = counted(lambda: torch.empty(100, 100).mT[3:].unsqueeze(0).expand(5, -1, -1))
    assert not counts.kernels
    assert counts.peak == {"cpu": 40000}


def test_what_has_gone_is_not_counted_as_living():
    counts = counted(lambda: [torch.ones(1000).sum() for _ in range(5)])
    assert 4000 <= counts.peak["cpu"] < 5000


@pytest.mark.parametrize("dtype, kind", [(torch.float32, FLOAT32), (torch.bfloat16, HALF)])
@pytest.mark.parametrize("transposed", [False, True])
def test_experts_count_the_products_of_the_tokens_that_are_routed_to_them(dtype, kind, transposed):
    """Whatever they are computed in: torch counts none, and of bfloat16 alone it tells the shape."""

    def run():
        tokens, weights = torch.randn(48, 16, dtype=dtype), torch.randn(4, 32, 16, dtype=dtype).mT
        weights = weights.contiguous() if transposed else weights
        offsets = torch.tensor([12, 24, 36, 48], dtype=torch.int32)
        assert torch.nn.functional.grouped_mm(tokens, weights, offs=offsets).shape == (48, 32)

    assert counted(run).flops(kind) == 2 * 48 * 16 * 32
