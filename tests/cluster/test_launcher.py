"""The files for Ray's cluster launcher, by Ray's own checks and by what AWS and Google Cloud say of their requests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from distprune.config import load_config
from distprune.engine.scheduler.ray_cluster import WorkerPlan, count_fitting, plan_workers

FOLDER = Path(__file__).parents[2] / "cluster"
CLOUDS = ["aws", "gcp"]


def load(cloud: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / f"{cloud}.yaml").read_text())


@pytest.mark.parametrize("cloud", CLOUDS)
def test_ray_takes_the_file(cloud):
    """All that `ray up` checks before it asks the cloud."""
    prepared = prepare_config(load(cloud))
    validate_config(prepared)
    kinds = prepared["available_node_types"]
    limits = {name: (kind["min_workers"], kind["max_workers"]) for name, kind in kinds.items()}
    assert limits == {"head": (0, 0), "spot_h100": (0, 8)}


@pytest.mark.parametrize("cloud", CLOUDS)
def test_ray_does_not_take_a_field_that_it_does_not_know(cloud):
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout"):
        validate_config(prepare_config(load(cloud) | {"idle_timeout": 5}))


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_spot_machine_has_room_for_a_worker_on_each_of_its_gpus_and_the_head_for_none(cloud):
    config = load_config(FOLDER / "runs" / "405b-elastic-spot.yaml", {})
    asked = {"CPU": float(config.threads_per_worker), "GPU": 1.0}
    kinds = load(cloud)["available_node_types"]
    assert count_fitting(asked, kinds["spot_h100"]["resources"]) == 8
    assert count_fitting(asked, kinds["head"]["resources"]) == 0
    most = 8 * kinds["spot_h100"]["max_workers"]
    assert plan_workers(config, [kinds["head"]["resources"]], layers=126) == WorkerPlan(most, "cuda", 20, 1, least=2)
    assert config.dtype == "bfloat16"


def test_aws_takes_its_machines():
    session = pytest.importorskip("botocore.session")
    validate = pytest.importorskip("botocore.validate")
    request = session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for kind in load("aws")["available_node_types"].values():
        report = validate.ParamValidator().validate({"MinCount": 1, "MaxCount": 1, **kind["node_config"]}, request)
        assert not report.has_errors(), report.generate_report()


def test_google_cloud_takes_its_machines():
    discovery = pytest.importorskip("googleapiclient.discovery_cache")
    schemas = json.loads(discovery.get_static_doc("compute", "v1"))["schemas"]
    for kind in load("gcp")["available_node_types"].values():
        check_fields(kind["node_config"], {"$ref": "Instance"}, schemas)


def check_fields(value: Any, schema: dict[str, Any], schemas: dict[str, Any]) -> None:
    """Every field of a message is one that its schema in Google's discovery document has, and of its type."""
    schema = schemas[schema["$ref"]] if "$ref" in schema else schema
    if "properties" in schema:
        assert isinstance(value, dict) and value.keys() <= schema["properties"].keys(), f"{value} is no {schema['id']}"
        for name, field in value.items():
            check_fields(field, schema["properties"][name], schemas)
    elif schema["type"] == "array":
        assert isinstance(value, list)
        for each in value:
            check_fields(each, schema["items"], schemas)
    else:
        kinds = {"string": (str, int), "boolean": bool, "integer": int, "number": (int, float)}  # int64 is a string
        assert isinstance(value, kinds[schema["type"]])
        assert value in schema.get("enum", [value])
