"""Llama 1 to 3 and the models that share its architecture (SmolLM2, Yi, TinyLlama, DeepSeek's first...)."""

from __future__ import annotations

from distprune.families.base import Family


class Llama(Family):
    def decoder_flags(self, config):
        return {
            "attention_bias": config.attention_bias,
            "attention_output_bias": config.attention_bias,
            "mlp_bias": config.mlp_bias,
        }

    def takes_heads(self, config, query_heads):
        # transformers' configuration insists on that, also where a head's width is given.
        return config.hidden_size % query_heads == 0


FAMILY = Llama("llama")
