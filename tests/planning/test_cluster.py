"""Machines as users describe them, and workers as the engine would place them."""

from __future__ import annotations

import pytest

from distprune import InputError
from distprune.config import PruneConfig
from distprune.engine.scheduler.ray_cluster import plan_workers
from distprune.planning import Cluster, describe_cluster
from distprune.planning.cluster import parse_bytes, place_workers
from distprune.planning.rates import RATES, rates_of


@pytest.mark.parametrize(
    "text, size",
    [("80GB", 80 * 10**9), ("80 gib", 80 * 2**30), ("1.5TB", 15 * 10**11), ("512", 512), ("2MiB", 2**21)],
)
def test_amounts_of_memory_are_read(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "80XB", "-1GB", "80 G B"])
def test_what_is_no_amount_of_memory_is_refused(text):
    with pytest.raises(InputError, match="80GB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    "options, cluster",
    [
        ({}, Cluster(gpus=8)),
        ({}, Cluster(gpus=16, nodes=2)),
        ({"workers": 3}, Cluster(gpus=8)),
        ({"gpus_per_worker": 0.5}, Cluster(gpus=4)),
        ({"gpus_per_worker": 2}, Cluster(gpus=8)),
        ({"device": "cpu"}, Cluster(gpus=8, cpus=32)),
        ({"threads_per_worker": 3}, Cluster(cpus=8)),
        ({}, Cluster(cpus=64)),
    ],
)
def test_workers_are_as_many_as_the_engine_would_start(options, cluster):
    config = PruneConfig(model="m", output="o", **options)
    node = {"CPU": float(cluster.cpus if config.device == "cpu" or not cluster.gpus else 1000)}
    nodes = [node | {"GPU": cluster.gpus / cluster.nodes}] * cluster.nodes
    engine, planned = plan_workers(config, nodes, layers=80), place_workers(config, cluster, layers=80)
    assert (planned.workers, planned.device) == (engine.count, engine.device)


def test_a_device_that_is_not_asked_for_is_refused():
    with pytest.raises(InputError, match="Give --gpus"):
        place_workers(PruneConfig(model="m", output="o", device="cuda"), Cluster(), layers=4)


def test_more_nodes_than_gpus_are_refused():
    with pytest.raises(InputError, match="--gpus is their number in all"):
        Cluster(gpus=2, nodes=4)


def test_one_node_without_gpus_is_this_machine():
    assert describe_cluster().host_memory > 0
    assert describe_cluster(gpus=8).host_memory is None
    assert describe_cluster(host_memory="64GB").host_memory == 64 * 10**9


def test_threads_speed_up_a_cpu_and_nothing_else():
    assert rates_of("cpu", 4, {}).float32 == 4 * RATES["cpu"].float32
    assert rates_of("cpu", 4, {}).write == RATES["cpu"].write
    assert rates_of("a100", 4, {}) == RATES["a100"]


def test_a_rate_can_be_overridden():
    assert rates_of("h100", 1, {"write": 5e9}).write == 5e9


@pytest.mark.parametrize("hardware, overrides", [("tpu", {}), ("cpu", {"speed": 1}), ("cpu", {"write": 0})])
def test_unknown_hardware_and_rates_are_refused(hardware, overrides):
    with pytest.raises(InputError, match=r"Choose one of|positive number"):
        rates_of(hardware, 1, overrides)
