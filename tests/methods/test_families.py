"""Every method on every family: profiles, a plan and pruned layers that run as the family's own class."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from kinds_of_methods import ALL_LAYERS, OF_ALL_MODELS
from tiny_families import FAMILIES, HIDDEN, tiny_model
from tiny_mixtures import mixture_model
from transformers import PreTrainedModel

from distprune.budgets import Target, layout_of
from distprune.layers.architecture import Architecture
from distprune.layers.runner import LayerRunner
from distprune.methods import METHODS, LayerToPrune
from distprune.methods.z_pruner import ZPruner
from distprune.statistics import LayerStatistics, sites_of

LAYOUTS = ("free", "heterogeneous", "stock")


@pytest.mark.filterwarnings("ignore::distprune.errors.ConvergenceWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_each_method_prunes_what_the_family_can_lose(family):
    prune_by_each_method(tiny_model(family), OF_ALL_MODELS, 0.1, 4)


#: Transposed and interleaved, in groups, with shared experts of one width and of another, beside networks without
#: experts, without gates, and beside mixers.
OF_EXPERTS = (
    "deepseek_v2", "deepseek_v3", "ernie4_5_moe", "glm4_moe", "gpt_oss", "granitemoe", "minimax_m2", "mixtral", "olmoe",
    "qwen2_moe", "qwen3_moe", "qwen3_next",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore::distprune.errors.ConvergenceWarning")
@pytest.mark.parametrize("family", OF_EXPERTS)
def test_each_method_prunes_mixtures_of_experts(family):
    model = mixture_model(family)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data.mul_(0.1)
    prune_by_each_method(model, METHODS, 0.2, 4)


def prune_by_each_method(real: PreTrainedModel, names: Iterable[str], sparsity: float, align: int) -> None:
    model = Architecture(real.config)
    state = {name: tensor.detach() for name, tensor in real.state_dict().items()}
    runner = LayerRunner(model, torch.device("cpu"), torch.float32, micro_batch=4)
    hidden_states = torch.randn(4, 12, HIDDEN, generator=torch.Generator().manual_seed(0))
    layers = []
    for index in range(model.num_layers):
        prefix = model.layer_prefix(index)
        own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        layers.append(model.layer_from_state(index, own))

    def observe(layer, index, moments) -> LayerStatistics:
        statistics, sites = LayerStatistics(moments), sites_of(moments)
        if any(site.is_gradient for site in sites):
            gradient = runner.run(layer, index, hidden_states).clone()
            runner.backward(layer, index, hidden_states, gradient, observe=statistics.update, sites=sites)
        else:
            runner.observe(layer, index, hidden_states, statistics.update, sites)
        return statistics

    methods = [METHODS[name](**ALL_LAYERS.get(name, {})) for name in names]
    for method in (*methods, ZPruner(mode="unstructured")):
        name, profiles = method.name, []
        for index, layer in enumerate(layers):
            moments = [*method.dense_moments(layer.shape), *method.gradient_moments(layer.shape)]
            moments += method.overview_moments(layer.shape)
            profiles.append(method.whole_profile(layer, observe(layer, index, moments)))
        for layout in method.layouts:
            target = Target(model, sparsity, layout=layout)
            if name == "flap" and layout == "heterogeneous":
                method = METHODS[name](compensation=False)
            method.check_target(target, align)
            plan = method.plan(target, profiles, align)
            assert (plan == target.dense_shapes) == method.zeroes
            assert layout == "free" or layout_of(model, plan) in ("stock", layout)
            for index, (layer, planned) in enumerate(zip(layers, plan, strict=True)):
                statistics = observe(layer, index, method.pruning_moments(layer.shape, planned))
                again = lambda variation, moments, index=index: observe(variation, index, moments)  # noqa: E731
                pruned = method.prune(LayerToPrune(index, layer, planned, statistics, profiles[index], again, sparsity))
                assert pruned.shape == planned, name
                assert runner.run(pruned, index, hidden_states).isfinite().all(), name


def test_the_page_says_which_methods_offer_which_layout():
    offered = {layout: {name for name in METHODS if layout in METHODS[name].layouts} for layout in LAYOUTS}
    assert offered["free"] == set(METHODS) and len(METHODS) == 14
    assert offered["heterogeneous"] == set(METHODS) - {"olica"}
    assert offered["stock"] == {"curvature", "magnitude", "mean-router-weight", "reap", "wanda-sp", "z-pruner"}
