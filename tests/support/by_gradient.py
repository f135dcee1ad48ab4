"""A small method of the kind that a plugin might bring: gradient moments, no dense ones, and a plan by its profiles."""

from __future__ import annotations

from dataclasses import replace

from distprune.budgets import fill_with_ffn
from distprune.layers.sites import FFN_OUTPUT, NEURONS
from distprune.methods import Method, Plan
from distprune.methods.base import of_parts
from distprune.methods.scored_units import keep_best_neurons
from distprune.statistics import Cross


class ByGradient(Method):
    """Narrows those FFNs most whose gradients are small, and keeps the neurons that matter most to the loss."""

    name = "by-gradient"
    removes = ("neurons",)

    def gradient_moments(self, shape):
        return of_parts(shape, ffn=[Cross(FFN_OUTPUT.gradient, NEURONS)])

    def profile(self, layer, statistics):
        return {"neurons": statistics.cross(FFN_OUTPUT.gradient, NEURONS).norm(dim=0)} if layer.ffn else {}

    def plan(self, target, profiles, align):
        wanted = [float(profile["neurons"].norm()) + 1e-9 for profile in profiles]
        return Plan(fill_with_ffn(target, target.dense_shapes, align, wanted))

    def pruning_moments(self, dense, planned):
        return ()

    def prune(self, given):
        ffn = given.layer.ffn
        return replace(given.layer, ffn=ffn and keep_best_neurons(ffn, given.planned.ffn, given.profile["neurons"]))
