"""Mistral: Llama's layer with a sliding attention window in every layer where the configuration sets one."""

from __future__ import annotations

from distprune.families.base import Family


class Mistral(Family):
    def decoder_flags(self, config):
        return {"sliding_window": config.sliding_window}


FAMILY = Mistral("mistral")
