"""Qwen3: an RMS norm on every query and key head before the rotary embedding."""

from __future__ import annotations

from distprune.families.base import Family


class Qwen3(Family):
    def decoder_flags(self, config):
        return {
            "attention_bias": config.attention_bias,
            "attention_output_bias": config.attention_bias,
            "query_key_norm": True,
            "sliding_window": config.sliding_window,
            "layer_types": list(config.layer_types),
        }


FAMILY = Qwen3("qwen3")
