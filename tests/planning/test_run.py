"""The plan of a run as a whole: what it promises, how it answers to its options, and its verdict."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import ray
import torch
from headers import write_headers
from kinds_of_methods import BRIEF, OF_ALL_MODELS
from tiny_families import tiny_config
from typer.testing import CliRunner

import distprune
from distprune import InputError
from distprune.budgets import Target, layer_parameters
from distprune.cli import app
from distprune.config import PruneConfig
from distprune.engine.run.preflight import dense_model
from distprune.hardware import ComputeDtype
from distprune.planning import Cluster
from distprune.planning import run as planning_run
from distprune.planning.model_from_headers import open_headers
from distprune.reporting.plan_tables import plan_summary


def stage(planned, name: str):
    return next(stage for stage in planned.stages if stage.name == name)


@pytest.mark.parametrize("method", OF_ALL_MODELS)
def test_what_remains_is_within_one_step_of_what_was_asked_for(plan, small, method):
    planned = plan(method=method, sparsity=0.3)
    dense = dense_model(open_headers(str(small))).architecture
    target, shape = Target(dense, 0.3), dense.dense_shape(0)
    narrower = shape.with_ffn(width=shape.ffn.width - 8)
    step = layer_parameters(dense, 0, shape) - layer_parameters(dense, 0, narrower)
    assert abs(planned.decoder_parameters_after - target.remaining) <= step


@pytest.mark.parametrize("method", OF_ALL_MODELS)
def test_parameters_are_those_that_a_run_reaches(plan, run, dense_path, method):
    _, record = run(method=method, options=BRIEF.get(method, {}), sparsity=0.3)
    planned = plan(dense_path, method=method, sparsity=0.3, samples=8, sequence_length=16)
    assert planned.decoder_parameters_before == record.decoder_parameters_before
    assert planned.total_parameters_before == record.total_parameters_before
    one_step = 3 * 8 * 64
    assert abs(planned.decoder_parameters_after - record.decoder_parameters_after) <= one_step


def test_a_target_out_of_reach_is_refused(plan):
    with pytest.raises(InputError, match="can't be reached"):
        plan(method="olica", sparsity=0.9)


def test_windows_beyond_the_context_are_refused(plan):
    with pytest.raises(InputError, match="context of 512"):
        plan(sequence_length=1024)


def test_the_calibration_set_decides_over_the_own_samples(plan, dense_path, calibration_path):
    planned = plan(dense_path, calibration=calibration_path)
    assert (planned.samples, planned.sequence_length) == (8, 16)
    assert "own samples" not in [stage.name for stage in planned.stages]


def test_blocks_are_pruned_side_by_side_and_the_dense_pass_is_a_relay(plan):
    relay = plan(cluster=Cluster(cpus=4), method="oops")
    parallel = plan(cluster=Cluster(cpus=4), method="oops", propagation=1)
    assert (relay.blocks, relay.block_length) == (1, 4)
    assert (parallel.blocks, parallel.block_length) == (4, 1)
    assert stage(parallel, "prune").seconds < 0.5 * stage(relay, "prune").seconds
    assert stage(parallel, "dense pass").seconds == stage(relay, "dense pass").seconds
    alone = plan(cluster=Cluster(cpus=1), method="oops")
    assert stage(alone, "prune").seconds == stage(relay, "prune").seconds


def test_workers_share_the_experts_of_a_layer_that_come_in_chunks(plan, tmp_path):
    sizes = {"hidden_size": 256, "moe_intermediate_size": 512, "num_experts": 32, "num_hidden_layers": 2}
    config = tiny_config("qwen3_moe", **sizes, architectures=["Qwen3MoeForCausalLM"], dtype="bfloat16")
    model = write_headers(tmp_path / "mixture", config)
    options = {"experts_at_once": 4, "samples": 32, "sequence_length": 32, "rates": {"call_seconds": 1e-4}}
    one, four = (plan(model, cluster=Cluster(cpus=cpus), **options) for cpus in (1, 4))
    for name, shared in (("dense pass", 0.9), ("gradient pass", 0.7), ("prune", 0.7)):
        assert stage(four, name).seconds < shared * stage(one, name).seconds
        assert stage(four, name).bytes_written == stage(one, name).bytes_written


def test_only_methods_that_need_gradients_have_a_gradient_pass(plan):
    plain, gradients = (plan(cluster=Cluster(cpus=2), method=method) for method in ("magnitude", "llm-pruner"))
    assert "gradient pass" not in [stage.name for stage in plain.stages]
    names = [stage.name for stage in gradients.stages]
    assert names.index("gradient pass") == names.index("dense pass") + 1 == names.index("prune") - 1
    back, forth = stage(gradients, "gradient pass"), stage(gradients, "dense pass")
    assert forth.half_flops == stage(plain, "dense pass").half_flops
    assert 2 < back.half_flops / forth.half_flops < 4  # forward once more and back, the moments and the head


def test_hidden_states_of_all_layers_wait_for_the_gradients(plan, headers_70b):
    options = {"samples": 512, "sequence_length": 8192}
    plain, gradients = (plan(headers_70b, method=method, **options).memory for method in ("magnitude", "llm-pruner"))
    assert gradients.disk > 81 * 512 * 8192 * 8192 * 2 > plain.disk


def test_a_further_round_passes_the_pruned_model_and_observes_the_dense_one(plan):
    options = {"cluster": Cluster(cpus=2), "method": "curvature", "sparsity": 0.3}
    once, twice = plan(**options), plan(**options, rounds=2)
    names = [stage.name for stage in twice.stages]
    assert names[names.index("prune") :][:3] == ["prune", "measure again", "prune again"]
    assert "measure again" not in [stage.name for stage in once.stages]
    again, back = stage(twice, "measure again"), stage(twice, "gradient pass")
    # Forward through what is pruned; back through the dense layers, and through what is pruned.
    assert 1.3 < again.half_flops / back.half_flops < 2.5
    assert stage(twice, "prune again").half_flops == stage(twice, "prune").half_flops
    assert twice.memory.disk > once.memory.disk


def test_layers_distil_side_by_side(plan):
    alone, four = (plan(cluster=Cluster(cpus=count), distill=True, method="flap") for count in (1, 4))
    assert stage(four, "distill").seconds < stage(alone, "distill").seconds
    assert stage(four, "distill").half_flops == stage(alone, "distill").half_flops > 0


def test_layers_that_learn_end_to_end_hand_a_step_on_in_parts(plan):
    distill = {"objective": "logits", "batch": 8}
    alone, four = (plan(cluster=Cluster(cpus=count), distill=distill, method="flap") for count in (1, 4))
    assert stage(four, "distill").seconds < stage(alone, "distill").seconds
    assert stage(four, "distill").half_flops == stage(alone, "distill").half_flops > 0


def test_a_faster_disk_shortens_what_waits_for_it(plan):
    slow, fast = (stage(plan(rates={"write": rate}), "assemble").seconds for rate in (1e6, 2e6))
    assert slow == pytest.approx(2 * fast, rel=0.01)


def test_bytes_are_those_of_the_files(plan, small):
    planned = plan(method="magnitude", sparsity=0, samples=4, sequence_length=8)
    size = sum(info.nbytes for info in open_headers(str(small)).tensors.values())
    assert stage(planned, "check").bytes_read == size
    outer = 2 * (2 * 1000 * 256 + 256)
    states = 4 * 8 * 256 * 2
    # Layers as parts and as shards, what lies outside them too, and hidden states in the journal: of the dense pass
    # those of the first of four layers, of the pruning pass those of the others.
    assert planned.bytes_written == 2 * size + states + 3 * states
    embeddings = states  # of every token, since none is taken to come twice in so short a text
    assert stage(planned, "dense pass").bytes_read == size - outer + embeddings


def test_statistics_and_solves_count_where_a_method_has_them(plan):
    plain, quadratic = plan(method="magnitude"), plan(method="oops")
    assert stage(plain, "prune").float64_flops == 0 < stage(quadratic, "prune").float64_flops
    assert stage(quadratic, "prune").half_flops > stage(plain, "prune").half_flops


def test_what_fits_is_said_to_fit(plan, headers_70b):
    planned = plan(headers_70b, Cluster(gpus=8, host_memory=10**12), method="slimgpt")
    assert planned.verdict.fits
    assert planned.verdict.problem is planned.verdict.fix is None


@pytest.mark.parametrize(
    "options, cluster, option",
    [
        ({"sequence_length": 8192, "micro_batch": 64}, Cluster(gpus=8, host_memory=10**12), "micro_batch"),
        ({"gpus_per_worker": 0.1, "sequence_length": 2048}, Cluster(gpus=1, host_memory=10**12), "gpus_per_worker"),
        ({"sequence_length": 2048}, Cluster(gpus=8, host_memory=60 * 10**9), "workers"),
    ],
)
def test_the_fix_names_an_option_that_makes_it_fit(plan, headers_70b, options, cluster, option):
    options = {"method": "magnitude", **options}
    refused = plan(headers_70b, cluster, **options).verdict
    assert not refused.fits
    assert refused.fix.startswith(f"Give {flag(option)} ")
    value = float(refused.fix.removesuffix(".").split()[-1])
    fixed = options | {option: value if option == "gpus_per_worker" else int(value)}
    assert plan(headers_70b, cluster, **fixed).verdict.fits


@pytest.mark.parametrize(
    "nodes, options, fix",
    [
        (8, {}, "--offload"),
        (1, {}, "--offload --workers 1"),
        (8, {"sequence_length": 2048}, "--offload --micro-batch 8"),
    ],
)
def test_a_gpu_that_holds_a_layer_but_not_what_its_solve_takes_has_it_offloaded(plan, headers_70b, nodes, options, fix):
    cluster = Cluster(gpus=8, nodes=nodes, gpu_memory=12 * 10**9, host_memory=10**11)
    verdict = plan(headers_70b, cluster, method="oops", **options).verdict
    assert "a GPU's 11.2 GiB" in verdict.problem
    assert verdict.fix == f"Give {fix}."


def test_a_layer_that_fits_on_no_gpu_asks_for_larger_ones(plan, headers_70b):
    cluster = Cluster(gpus=8, gpu_memory=2 * 10**9, host_memory=10**11)
    verdict = plan(headers_70b, cluster, method="oops").verdict
    assert "a GPU's 1.9 GiB" in verdict.problem
    assert "Ask for GPUs of" in verdict.fix


def test_offloaded_solves_take_the_hosts_time(plan, headers_70b):
    here, there = (plan(headers_70b, Cluster(gpus=1), method="slimgpt", offload=given) for given in (False, True))
    assert stage(there, "prune").seconds > 2 * stage(here, "prune").seconds
    assert stage(there, "prune").float64_flops == stage(here, "prune").float64_flops


def test_planning_starts_no_ray(plan, monkeypatch):
    monkeypatch.setattr(ray, "init", None)  # other tests may have started one
    plan(method="magnitude")


# ------------------------------------------------------------------ the command


def command(*arguments):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)], prog_name="distprune")


def test_json_is_one_object_the_same_that_python_gives(small):
    options = {"method": "oops", "sparsity": 0.25, "gpus": 8, "nodes": 2, "host_memory": "512GB"}
    result = command(small, "--json", *(part for name, value in options.items() for part in (flag(name), value)))
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == json.loads(json.dumps(asdict(distprune.plan(str(small), **options))))


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def test_the_table_says_what_the_plan_holds(small):
    result = command(small, "--gpus", 8, "--distill-epochs", 2, "--rate", "write=3e9", "--propagation", 2)
    assert result.exit_code == 0, result.output
    for words in ("2 blocks of 2", "8 GPUs on 1 node", "distill", "dense pass", "write 3 GB/s", "(h100)"):
        assert words in result.stdout
    assert result.stdout.strip().endswith("fits; host memory was not checked: give --host-memory")


def test_a_yaml_file_of_the_run_serves_the_plan(small, tmp_path):
    config = PruneConfig(model=str(small), output="elsewhere", method="flap", sparsity=0.4)
    file = tmp_path / "run.yaml"
    file.write_text(config.to_yaml())
    planned = json.loads(command("--config", file, "--json").stdout)
    assert (planned["method"], planned["sparsity"]) == ("flap", 0.4)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--gpu-memory", "much"), "'much' is no amount of memory"),
        (("--rate", "write"), "--rate write: write NAME=VALUE"),
        (("--rate", "speed=3"), "rate 'speed'"),
        (("--hardware", "abacus"), "hardware 'abacus'"),
        (("--method", "axe"), "method 'axe' does not exist"),
        (("--device", "cuda"), "Give --gpus"),
    ],
)
def test_bad_input_is_refused_in_one_message(small, arguments, words):
    result = command(small, *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_is_the_dtype_of_this_machine_s_cpu_and_the_checkpoint_s_on_gpus(plan, monkeypatch, dtype):
    of_cpu = ComputeDtype(dtype, "as it is")
    monkeypatch.setattr(planning_run, "compute_dtype", lambda stored, device: of_cpu)
    here, there = plan(dtype="auto"), plan(dtype="auto", cluster=Cluster(gpus=1))
    assert (here.dtype, here.dtype_reason, there.dtype) == (of_cpu.name, "as it is", "bfloat16")
    assert f"forward passes in {of_cpu.name}: as it is" in plan_summary(here)
    assert here.memory == plan(dtype=of_cpu.name).memory


def test_gates_take_a_step_as_often_as_they_learn(plan, small):
    once, often = (plan(method="flop", options={"steps": steps}) for steps in (1, 50))
    assert stage(often, "gates").seconds == pytest.approx(50 * stage(once, "gates").seconds, rel=0.01)
    assert stage(often, "gates").float32_flops + stage(often, "gates").half_flops > 0
    assert "gates" not in [each.name for each in plan(method="magnitude").stages]
