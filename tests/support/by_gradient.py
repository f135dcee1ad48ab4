"""A small method of the kind that a plugin might bring: gradient moments, no dense ones, and a plan by its profiles."""

from __future__ import annotations

from distprune.budgets import fill_with_ffn
from distprune.methods import Method, Plan
from distprune.methods.uniform import keep_best
from distprune.statistics import Cross


class ByGradient(Method):
    """Narrows those FFNs most whose gradients are small, and keeps the neurons that matter most to the loss."""

    name = "by-gradient"

    def gradient_moments(self, shape):
        return [Cross("ffn_output_gradient", "ffn_neurons")]

    def profile(self, layer, statistics):
        return {"neurons": statistics.cross("ffn_output_gradient", "ffn_neurons").norm(dim=0)}

    def plan(self, target, profiles, align):
        wanted = [float(profile["neurons"].norm()) + 1e-9 for profile in profiles]
        return Plan(fill_with_ffn(target, target.dense_shapes, align, wanted))

    def pruning_moments(self, dense, planned):
        return ()

    def prune(self, layer, planned, statistics, profile, observe):
        return keep_best(layer, planned, profile["neurons"].new_ones(layer.kv_heads), profile["neurons"])
