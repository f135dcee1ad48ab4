"""The files for Kubernetes, against its schemas and KubeRay's, and the scheduler's script with a `kubectl` of its own.

KubeRay's schemas are looked for in the folder $KUBERAY_CRDS, as rayclusters.yaml.gz, rayjobs.yaml.gz and
raycronjobs.yaml.gz: the gzipped files of ray-operator/config/crd/bases in its repository.
"""

from __future__ import annotations

import copy
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from crd_schemas import schema_of

from distprune.config import load_config
from distprune.engine.scheduler.ray_cluster import WorkerPlan, count_fitting, plan_workers

FOLDER = Path(__file__).parents[2] / "cluster"
CRDS = Path(os.environ.get("KUBERAY_CRDS", "no such folder"))
needs_crds = pytest.mark.skipif(not CRDS.is_dir(), reason="needs KubeRay's schemas in $KUBERAY_CRDS")


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / "kubernetes" / name).read_text()))


def only(name: str) -> dict[str, Any]:
    (document,) = documents(name)
    return document


def of_kind(kind: str) -> dict[str, Any]:
    """The one document of a kind in cronjob.yaml."""
    return next(document for document in documents("cronjob.yaml") if document["kind"] == kind)


def scheduled_rayjob() -> dict[str, Any]:
    return yaml.safe_load(of_kind("ConfigMap")["data"]["rayjob.yaml"])


CUSTOM = {
    "raycluster.yaml": lambda: (only("raycluster.yaml"), "rayclusters"),
    "rayjob.yaml": lambda: (only("rayjob.yaml"), "rayjobs"),
    "raycronjob.yaml": lambda: (only("raycronjob.yaml"), "raycronjobs"),
    "cronjob.yaml": lambda: (scheduled_rayjob(), "rayjobs"),
}
SPECS = {
    "raycluster.yaml": lambda: only("raycluster.yaml")["spec"],
    "rayjob.yaml": lambda: only("rayjob.yaml")["spec"]["rayClusterSpec"],
    "raycronjob.yaml": lambda: only("raycronjob.yaml")["spec"]["jobTemplate"]["rayClusterSpec"],
    "cronjob.yaml": lambda: scheduled_rayjob()["spec"]["rayClusterSpec"],
}


def errors(document: dict[str, Any], resource: str) -> list[str]:
    schema = schema_of(CRDS / f"{resource}.yaml.gz")
    return [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(document)]


@needs_crds
@pytest.mark.parametrize("name", CUSTOM)
def test_kuberay_takes_the_file(name):
    assert errors(*CUSTOM[name]()) == []


@needs_crds
def test_a_field_that_kuberay_does_not_know_is_an_error():
    document = copy.deepcopy(only("raycluster.yaml"))
    document["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["resorces"] = {}
    (message,) = errors(document, "rayclusters")
    assert "'resorces' was unexpected" in message


@pytest.mark.parametrize("name", ["cronjob.yaml", "storage.yaml"])
def test_kubernetes_takes_the_file(name):
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    for document in documents(name):
        kubernetes_validate.validate(document, "1.33", strict=True)


@pytest.mark.parametrize("group", ["headGroupSpec", "workerGroupSpecs"])
def test_kubernetes_takes_the_pods_of_the_cluster(group):
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    spec = SPECS["raycluster.yaml"]()[group]
    template = (spec[0] if isinstance(spec, list) else spec)["template"]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **template}
    kubernetes_validate.validate(pod, "1.33", strict=True)


@pytest.mark.parametrize("name", SPECS)
def test_all_files_have_the_same_cluster(name):
    assert SPECS[name]() == SPECS["raycluster.yaml"]()


def test_a_worker_pod_has_room_for_a_worker_on_each_of_its_gpus():
    limits = SPECS["raycluster.yaml"]()["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["resources"][
        "limits"
    ]
    config = load_config(FOLDER / "runs" / "70b-eight-gpus.yaml", {})
    asked = {"CPU": float(config.threads_per_worker), "GPU": 1.0}
    assert count_fitting(asked, {"CPU": float(limits["cpu"]), "GPU": float(limits["nvidia.com/gpu"])}) == 8


def test_the_job_starts_where_there_is_no_gpu_yet():
    """Its command is a run of the configuration that storage.yaml names, and asks Ray for GPUs that are to come."""
    program, command, *words = shlex.split(only("rayjob.yaml")["spec"]["entrypoint"])
    options = dict(zip((word[2:].replace("-", "_") for word in words[::2]), words[1::2], strict=True))
    assert (program, command, options.pop("config")) == ("distprune", "prune", "/config/run.yaml")
    config = load_config(FOLDER / "runs" / "70b-eight-gpus.yaml", options)
    assert plan_workers(config, [{"CPU": 0.0}], layers=80) == WorkerPlan(16, "cuda", config.threads_per_worker, 1, 1)
    assert config.dtype == "bfloat16"


# ------------------------------------------------------------------ the scheduler of cronjob.yaml

# Logs what it is asked, and tells the states in $STATES one after another.
KUBECTL = """#!/usr/bin/env bash
echo "$1" >>"$FOLDER/verbs"
case $1 in
    create) echo rayjob.ray.io/distprune-x7k2p ;;
    get)
        read -r state rest <"$FOLDER/states"
        echo "$rest" >"$FOLDER/states"
        [[ $state != - ]] || exit 1
        echo "$state" ;;
esac
"""


@pytest.fixture
def schedule(tmp_path):
    """Runs the scheduler's script with such states of the RayJob. Gives its exit status and the verbs it used."""
    (tmp_path / "kubectl").write_text(KUBECTL)
    (tmp_path / "kubectl").chmod(0o755)
    (container,) = of_kind("CronJob")["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])

    def run(states: str) -> tuple[int, list[str]]:
        (tmp_path / "states").write_text(states + "\n")
        environment = {"PATH": path, "FOLDER": str(tmp_path), "POLL": "0.01"}
        done = subprocess.run([*container["command"], *container["args"]], env=environment, timeout=60, check=False)
        return done.returncode, (tmp_path / "verbs").read_text().split()

    return run


@pytest.mark.parametrize(
    ("states", "status"),
    [
        ("Initializing Running Complete", 0),
        ("Running Retrying Running Failed", 1),
        ("ValidationFailed", 1),
        ("Running - Complete", 0),  # the API server did not answer once
    ],
)
def test_the_scheduler_waits_for_the_end_of_the_rayjob_and_has_its_fate(schedule, states, status):
    returned, verbs = schedule(states)
    assert returned == status
    assert verbs == ["create", *["get"] * len(states.split())]
    (rule,) = of_kind("Role")["rules"]
    assert set(verbs) == set(rule["verbs"])
    assert (rule["apiGroups"], rule["resources"]) == (["ray.io"], ["rayjobs"])


def test_a_scheduler_whose_rayjob_is_not_created_fails(schedule, tmp_path):
    (tmp_path / "kubectl").write_text('#!/usr/bin/env bash\necho "$1" >>"$FOLDER/verbs"; exit 1\n')
    assert schedule("") == (1, ["create"])
