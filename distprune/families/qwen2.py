"""Qwen2 and Qwen2.5: biases on queries, keys and values, and a sliding window in some layers."""

from __future__ import annotations

from distprune.families.base import Family


class Qwen2(Family):
    def decoder_flags(self, config):
        return {
            "attention_bias": True,
            "sliding_window": config.sliding_window,
            "layer_types": list(config.layer_types),
        }


FAMILY = Qwen2("qwen2")
