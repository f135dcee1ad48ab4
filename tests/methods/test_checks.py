"""Results that are no numbers are refused by name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from distprune.checks import check_solution, named_tensors, solving
from distprune.errors import InputError
from distprune.layers.parts import LowRank


def test_a_sound_layer_passes(subject):
    check_solution(subject().layer, 3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_tensor_of_a_part_is_named_by_its_place(subject, bad):
    this = subject()
    down = replace(this.ffn.down, weight=this.ffn.down.weight.clone())
    down.weight[2, 3] = bad
    with pytest.raises(ArithmeticError, match=r"pruning layer 7 gave NaN or infinite values in ffn\.down\.weight"):
        check_solution(this.changed(ffn=replace(this.ffn, down=down)).layer, 7)


def test_every_tensor_of_a_layer_is_looked_at(subject):
    this = subject("qwen3")
    factored = LowRank(torch.ones(2, 24), torch.ones(32, 2))
    layer = this.changed(attention=replace(this.attention, query=factored)).layer
    names = [name for name, _ in named_tensors(layer)]
    assert {"attention.query.right", "attention.query.left", "rest.self_attn.q_norm.weight"} <= set(names)
    assert len(names) == len(this.model.names(0).state_of(layer))


def test_what_can_not_be_solved_names_the_layer_and_what_helps():
    with pytest.raises(InputError, match=r"layer 5: method oops can't solve.*damping"), solving("oops", 5):
        torch.linalg.cholesky(-torch.eye(2))
    with pytest.raises(InputError, match="layer 5: too little text"), solving("oops", 5):
        raise InputError("too little text")
