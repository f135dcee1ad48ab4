"""Olica as research code does it: one process, the whole model in memory, hooks, full singular value decompositions.

    python scripts/single_process.py MODEL --calibration calib.arrow --output pruned --sparsity 0.3 --threads 2

The yardstick that scripts/speed.py measures distprune with. Mathematics, budget, calibration set, the dtype of forward
passes and the format of the result are distprune's, so that results can be compared; how it is computed shares nothing
with it. It is no worse a program than need be: its batches are as large, and it keeps second moments where they are
enough. It knows Llama models without biases.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, PreTrainedModel

from distprune.budgets import Target
from distprune.calibration import open_calibration
from distprune.calibration.whole_model import load_config, load_model
from distprune.export.output_config import output_config
from distprune.layers.architecture import Architecture
from distprune.layers.module import say_shape
from distprune.layers.shapes import AttentionShape, FeedForwardShape, LayerShape
from distprune.methods import make_method
from distprune.modeling.modeling_pruned import PrunedLlamaForCausalLM

BATCH = 16
PUBLISHED_TOKENS = 128 * 128
OLICA = make_method("olica", {})
seconds: Counter[str] = Counter()


@torch.inference_mode()
def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    with timed("load"):
        model = load_model(arguments.model, "cpu")
        tokens = torch.from_numpy(open_calibration(arguments.calibration).tokens.astype("int64"))
    stored, architecture = load_config(arguments.model).dtype, Architecture(model.config)
    with timed("dense pass"):
        profiles = dense_pass(model, tokens)
    plan = OLICA.plan(Target(architecture, arguments.sparsity), profiles, align=8)
    pruned = empty_pruned(architecture, plan).to(model.dtype).eval()
    prune_layers(model, pruned, plan, tokens, sequential=arguments.propagation == "full")
    with timed("save"):
        outside = {name: tensor for name, tensor in model.state_dict().items() if ".layers." not in name}
        pruned.load_state_dict(outside, strict=False)
        pruned.to(stored).save_pretrained(arguments.output)
        AutoTokenizer.from_pretrained(arguments.model).save_pretrained(arguments.output)
    (arguments.output / "seconds.json").write_text(json.dumps(seconds))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a Llama model")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--sparsity", type=float, default=0.3)
    parser.add_argument("--propagation", choices=("1", "full"), default="full")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def empty_pruned(architecture: Architecture, plan: list[LayerShape]) -> PreTrainedModel:
    """A model of layers of these shapes, which is still to be filled. No rotary pairs go."""
    said = [say_shape(architecture.dense_shape(index), shape, None) for index, shape in enumerate(plan)]
    config = output_config(architecture, architecture.config, said, "free")
    return PrunedLlamaForCausalLM(LlamaConfig.from_dict(config))


@contextmanager
def timed(step: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[step] += time.perf_counter() - start


# ---------------------------------------------------------------- running layers


def run_layer(model: nn.Module, index: int, states: Tensor) -> Tensor:
    """The layer's output for (samples, length, d) hidden states."""
    positions = torch.arange(states.shape[1])[None]
    rotary = model.model.rotary_emb(states, positions)
    layer = model.model.layers[index]
    return torch.cat(
        [layer(batch, position_embeddings=rotary, position_ids=positions) for batch in states.split(BATCH)]
    )


@contextmanager
def hooked(hooks: dict[nn.Module, Callable[[Tensor, Tensor], None]]) -> Iterator[None]:
    """While open, each module shows what goes in and comes out of it, (tokens, width) each in float32."""

    def show(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        hooks[module](inputs[0].flatten(0, -2).float(), output.flatten(0, -2).float())

    handles = [module.register_forward_hook(show) for module in hooks]
    yield
    for handle in handles:
        handle.remove()


class Sums(dict):
    """Sums over tokens by name."""

    def add(self, **values: Tensor) -> None:
        for name, value in values.items():
            self[name] = self[name] + value if name in self else value

    def add_regression(self, x: Tensor, y: Tensor) -> None:
        """What a regression of y on x takes."""
        self.add(xx=x.T @ x, xy=x.T @ y, x=x.sum(0), y=y.sum(0), yy=y.square().sum(0))


# ---------------------------------------------------------------- the dense pass


def dense_pass(model: nn.Module, tokens: Tensor) -> list[dict[str, Tensor]]:
    """How well a linear map of each FFN's input explains its output."""
    states, profiles = model.model.embed_tokens(tokens), []
    for index, layer in enumerate(model.model.layers):
        sums = Sums()
        with hooked({layer.mlp: sums.add_regression}):
            states = run_layer(model, index, states)
        _, correlation = regress(sums, tokens.numel())
        profiles.append({"ffn_linearity": correlation.mean()})
    return profiles


def regress(sums: Sums, tokens: int) -> tuple[Tensor, Tensor]:
    """Ridge regression of y on x, (in, out), and the correlation of prediction and y for every output channel."""
    gram, cross, x, y, power = (sums[name] / tokens for name in ("xx", "xy", "x", "y", "yy"))
    damping = OLICA.percdamp * PUBLISHED_TOKENS / tokens * gram.diagonal().mean()
    solution = torch.linalg.inv(gram + damping * torch.eye(len(gram))) @ cross
    covariance = (solution * cross).sum(0) - (x @ solution) * y
    variance = (solution * (gram @ solution)).sum(0) - (x @ solution).square()
    return solution, (covariance / (variance * (power - y.square())).sqrt()).nan_to_num().clamp(-1, 1)


# ---------------------------------------------------------------- the pruning pass


def prune_layers(model: nn.Module, pruned: nn.Module, plan: list[LayerShape], tokens: Tensor, *, sequential: bool):
    """Layer after layer, on what the pruned layers before it give where ``sequential``, else on dense activations."""
    states = model.model.embed_tokens(tokens)
    for index, shape in enumerate(plan):
        layer = model.model.layers[index]
        with timed("statistics"):
            sums, ffn_inputs, output = collect(model, index, states, keep_inputs=shape.ffn.branch_rank is not None)
        rms = {name: (total / tokens.numel()).sqrt() for name, total in sums.items() if name != "values"}
        with timed("solve"):
            state = prune_attention(layer, shape.attention, rms, sums["values"] / tokens.numel())
            ffn, dropped = prune_ffn(layer, shape.ffn, rms)
            state |= ffn
        if shape.ffn.branch_rank:
            with timed("calibrate"):
                state |= calibrate(layer.mlp, dropped, ffn_inputs, shape.ffn.branch_rank)
        state["input_layernorm.weight"] = layer.input_layernorm.weight
        state["post_attention_layernorm.weight"] = layer.post_attention_layernorm.weight
        pruned.model.layers[index].load_state_dict(state)
        if sequential and index + 1 < len(plan):
            with timed("propagate"):
                output = run_layer(pruned, index, states)
        states = output


def collect(model: nn.Module, index: int, states: Tensor, *, keep_inputs: bool) -> tuple[Sums, list[Tensor], Tensor]:
    """Sums of squares of activations, the Gram matrix of every head's values, the FFN's inputs, and the output."""
    layer, sums, kept, heads = model.model.layers[index], Sums(), [], model.config.num_attention_heads

    def attention_input(x: Tensor, _: Tensor) -> None:
        sums.add(attention_input=x.square().sum(0))

    def attention_values(z: Tensor, _: Tensor) -> None:
        z = z.unflatten(1, (heads, -1)).transpose(0, 1)
        sums.add(values=z.mT @ z)

    def ffn_input(x: Tensor, _: Tensor) -> None:
        sums.add(ffn_input=x.square().sum(0))
        if keep_inputs:
            kept.append(x.to(states.dtype))

    def ffn_neurons(a: Tensor, _: Tensor) -> None:
        sums.add(ffn_neurons=a.square().sum(0))

    attention, ffn = layer.self_attn, layer.mlp
    hooks = {attention.v_proj: attention_input, attention.o_proj: attention_values}
    with hooked(hooks | {ffn: ffn_input, ffn.down_proj: ffn_neurons}):
        return sums, kept, run_layer(model, index, states)


def prune_attention(
    layer: nn.Module, shape: AttentionShape, rms: dict[str, Tensor], values: Tensor
) -> dict[str, Tensor]:
    attention = layer.self_attn
    groups, x_rms = shape.kv_heads, rms["attention_input"]
    value = attention.v_proj.weight.float().unflatten(0, (groups, -1))  # (g, v, d)
    output = attention.o_proj.weight.float().unflatten(1, (groups, shape.query_heads // groups, -1))  # (d, g, m, v)
    values = values.unflatten(0, (groups, -1))  # (g, m, v, v)
    new_values, new_outputs = [], []
    for group in range(groups):
        rotation = torch.linalg.svd(values[group].mean(0)).U
        rotated_value, rotated_output = rotation.T @ value[group], output[:, group] @ rotation
        energy = (rotation.T @ values[group] @ rotation).diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
        importance = (rotated_value * x_rms).norm(dim=1) + (rotated_output * energy).norm(dim=(0, 1))
        kept = importance.argsort(descending=True)[: shape.value_dim].sort().values
        new_values.append(rotated_value[kept])
        new_outputs.append(rotated_output[:, :, kept].flatten(1))
    # Values that are narrower than the class makes them stand beside it.
    place = "self_attn.narrow" if shape.value_dim < len(values[0, 0]) else "self_attn"
    state = {f"{place}.v_proj.weight": torch.cat(new_values), f"{place}.o_proj.weight": torch.cat(new_outputs, dim=1)}
    for name, rank in (("q_proj", shape.query_rank), ("k_proj", shape.key_rank)):
        weight = getattr(attention, name).weight
        if rank is None:
            state[f"self_attn.{name}.weight"] = weight
            continue
        left, right = truncate(weight.float(), x_rms, rank)
        state |= {f"self_attn.left.{name}.weight": left, f"self_attn.right.{name}.weight": right}
    return state


def truncate(weight: Tensor, scale: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The truncated singular value decomposition of the weight, inputs scaled."""
    scale = scale.clamp(min=1e-8)
    u, s, v = torch.linalg.svd(weight * scale, full_matrices=False)
    return u[:, :rank] * s[:rank], v[:rank] / scale


def prune_ffn(layer: nn.Module, shape: FeedForwardShape, rms: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """The FFN's pruned weights, and the neurons that are gone."""
    gate, up, down = (getattr(layer.mlp, f"{name}_proj").weight.float() for name in ("gate", "up", "down"))
    rows = (up * rms["ffn_input"]).norm(dim=1) + (gate * rms["ffn_input"]).norm(dim=1)
    order = (rows + down.norm(dim=0) * rms["ffn_neurons"]).argsort(descending=True)
    least = int(OLICA.keep_least * len(order))
    kept = torch.cat([order[: shape.width - least], order[len(order) - least :]]).sort().values
    dropped = order[shape.width - least : len(order) - least]
    weights = {"gate": gate[kept], "up": up[kept], "down": down[:, kept]}
    return {f"mlp.{name}_proj.weight": weight for name, weight in weights.items()}, dropped


def calibrate(ffn: nn.Module, dropped: Tensor, inputs: list[Tensor], rank: int) -> dict[str, Tensor]:
    """Linear calibration: a low-rank map of the FFN's input to what the dropped neurons gave."""
    gate, up, down = ffn.gate_proj.weight[dropped], ffn.up_proj.weight[dropped], ffn.down_proj.weight[:, dropped]
    sums = Sums()
    for x in inputs:
        residual = (ffn.act_fn(x @ gate.T) * (x @ up.T)) @ down.T
        sums.add_regression(x.float(), residual.float())
    solution, correlation = regress(sums, sum(map(len, inputs)))
    weights = torch.sigmoid((correlation - correlation.mean()) / OLICA.channel_temperature)
    u, s, v = torch.linalg.svd(solution.T * weights[:, None], full_matrices=False)
    left, right = u[:, :rank] * s[:rank] / weights[:, None], v[:rank]
    return {"mlp.left.branch.weight": left, "mlp.right.branch.weight": right}


if __name__ == "__main__":
    main()
