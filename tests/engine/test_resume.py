"""A run that ended anywhere, at any write, goes on when it is started again, and gives the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import ray
from interruptions import Stops

from distprune import InputError, status
from distprune.errors import WorkersLost

OPTIONS = {"sparsity": 0.3, "max_shard_size": 60_000, "propagation": 2, "distill": {"learning_rate": 1e-3, "batch": 2}}
LAYERS = 4


@pytest.fixture(scope="module")
def undisturbed(run, digests) -> dict[str, str]:
    return digests(run(**OPTIONS)[0])


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "pruned"


@pytest.mark.parametrize(
    ("stage", "steps", "repeated"),
    [
        ("Dense pass", 2, {"open_forward": 2, "prune": 4, "distill": 4}),
        ("Pruning", 1, {"open_forward": 0, "prune": 3, "distill": 4}),
        ("Pruning", 3, {"open_forward": 0, "prune": 1, "distill": 4}),
        ("Distilling", 3, {"open_forward": 0, "prune": 0, "distill": 1}),
        ("Assembling", 0, {"open_forward": 0, "prune": 0, "distill": 0}),
    ],
)
def test_nothing_that_is_done_is_done_again(run, undisturbed, digests, calls, output, stage, steps, repeated):
    with pytest.raises(KeyboardInterrupt):
        run(output=output, progress=Stops(stage, steps), **OPTIONS)
    calls.clear()
    folder, record = run(output=output, **OPTIONS)
    assert digests(folder) == undisturbed
    kinds = [kind for kind, _ in calls]
    assert {name: kinds.count(name) for name in repeated} == repeated
    assert "check_layer" not in kinds
    assert len(record.layers) == LAYERS and all(layer.distillation for layer in record.layers)


def test_another_number_of_workers_goes_on_and_other_options_do_not(run, undisturbed, digests, output):
    with pytest.raises(KeyboardInterrupt):
        run(output=output, progress=Stops("Pruning", 1, KeyboardInterrupt()), **OPTIONS)
    changed = OPTIONS | {"sparsity": 0.4}
    with pytest.raises(InputError, match=r"pruned\.partial: holds an unfinished run with another sparsity.*--restart"):
        run(output=output, **changed)
    assert digests(run(output=output, workers=3, **OPTIONS)[0]) == undisturbed


def test_restart_begins_anew(run, digests, calls, output):
    with pytest.raises(KeyboardInterrupt):
        run(output=output, progress=Stops("Pruning", 1, KeyboardInterrupt()), **OPTIONS)
    calls.clear()
    changed = OPTIONS | {"sparsity": 0.4}
    folder, _ = run(output=output, restart=True, **changed)
    assert [kind for kind, _ in calls].count("open_forward") == LAYERS
    assert digests(folder) == digests(run(**changed)[0])


def test_a_run_that_lost_its_workers_can_go_on_and_one_with_bad_input_leaves_nothing(run, output):
    with pytest.raises(WorkersLost):
        run(output=output, progress=Stops("Pruning", 1, WorkersLost("too many")), **OPTIONS)
    assert output.with_name("pruned.partial").is_dir()
    with pytest.raises(InputError):
        run(output=output, progress=Stops("Pruning", 2, InputError("bad")), **OPTIONS)
    assert os.listdir(output.parent) == []


def test_own_samples_are_drawn_once(run, output, digests, calls):
    options = {"calibration": None, "samples": 4, "sequence_length": 12, "sparsity": 0.3}
    with pytest.raises(KeyboardInterrupt):
        run(output=output, progress=Stops("Dense pass", 1, KeyboardInterrupt()), **options)
    calls.clear()
    folder, _ = run(output=output, **options)
    assert "write_own_samples" not in [kind for kind, _ in calls]
    assert digests(folder) == digests(run(**options)[0])
    assert (folder / "calibration.arrow").is_file()


@pytest.fixture(scope="module")
def long_model(save_model) -> Path:
    """So many layers that a signal arrives while they are pruned."""
    return save_model(num_hidden_layers=24)


@pytest.fixture(scope="module")
def undisturbed_long(run, long_model, digests) -> dict[str, str]:
    return digests(run(long_model, sparsity=0.3)[0])


@pytest.mark.parametrize(
    "sent",
    [signal.SIGTERM, *(pytest.param(other, marks=pytest.mark.slow) for other in (signal.SIGINT, signal.SIGKILL))],
)  # test_chaos sends all three
def test_a_run_that_is_told_to_stop_is_resumed_by_the_same_command(
    run, long_model, undisturbed_long, calibrate, digests, output, sent
):
    options = {
        "--calibration": calibrate(long_model),
        "--output": output,
        "--method": "olica",
        "--sparsity": 0.3,
        "--micro-batch": 3,
        "--workers": 1,
        "--device": "cpu",
        "--address": ray.get_runtime_context().gcs_address,
    }
    arguments = [str(part) for option in options.items() for part in option]
    command = [sys.executable, "-m", "distprune.cli", "prune", str(long_model), *arguments]
    # Where the tests run in the background, SIGINT is ignored, and children inherit that.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed) as process:
        told = []
        for line in process.stderr:
            # Once: the line comes again where the signal cut off its printing.
            if line.startswith("Pruning: 6/24") and line not in told:
                process.send_signal(sent)
            told.append(line)
    assert process.returncode == (-signal.SIGKILL if sent == signal.SIGKILL else 130), "".join(told)
    if sent != signal.SIGKILL:
        assert "resumes where it stopped" in told[-1]
    assert status(output).state == "stopped"
    folder, _ = run(long_model, output=output, sparsity=0.3)
    assert digests(folder) == undisturbed_long
