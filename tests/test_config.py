"""What a run is: validated options from YAML, the command line and Python, and their fingerprint."""

from __future__ import annotations

import inspect as python
from pathlib import Path

import pytest
import yaml

from distprune import InputError
from distprune.cli import prune_command
from distprune.config import PLACEMENT, DistillConfig, PruneConfig, SearchConfig, load_config

# One value for every option, and none of them the default.
VALUES = {
    "model": "somewhere/model",
    "output": "somewhere/else",
    "method": "another",
    "options": {"k": 2.0},
    "sparsity": 0.5,
    "target": "flops",
    "latency_table": "table.json",
    "count_embeddings": True,
    "layout": "stock",
    "align": 64,
    "calibration": "set.arrow",
    "samples": 7,
    "sequence_length": 9,
    "seed": 3,
    "distill": {
        "objective": "layers",
        "calibration": "more.arrow",
        "epochs": 2,
        "learning_rate": 1e-4,
        "train": "lora",
        "rank": 4,
        "train_routers": True,
        "look_ahead": 2,
        "batch": 2,
        "held_out": 0.5,
        "seed": 1,
    },
    "propagation": 2,
    "rounds": 2,
    "search": {"steps": 3, "seconds": 60.0, "samples": 4, "calibration": "held_out.arrow"},
    "library": "somewhere/library",
    "from_library": "somewhere/other",
    "micro_batch": 5,
    "experts_at_once": 4,
    "dtype": "float16",
    "device": "cuda",
    "offload": True,
    "workers": 4,
    "threads_per_worker": 2,
    "gpus_per_worker": 0.5,
    "address": "auto",
    "weights": "served",
    "writes": "driver",
    "max_shard_size": 1000,
    "push_to_hub": "org/name",
    "hub_ignore": ["*.html"],
    "private": False,
    "overwrite": True,
    "restart": True,
    "revision": "main",
    "trust_remote_code": True,
}


@pytest.fixture
def yaml_file(tmp_path):
    def write(content) -> Path:
        file = tmp_path / "run.yaml"
        file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return file

    return write


def test_every_option_can_be_set_in_yaml(yaml_file):
    assert set(VALUES) == set(PruneConfig.model_fields)
    config = load_config(yaml_file(VALUES), {})
    assert config.model_dump(mode="json") == VALUES
    defaults = PruneConfig(model="m", output="o")
    assert all(getattr(config, name) != getattr(defaults, name) for name in VALUES)


def test_the_command_line_has_every_option_under_the_same_name():
    parameters = set(python.signature(prune_command.prune).parameters)
    groups = {"distill_": DistillConfig, "search_": SearchConfig}
    grouped = {name for name in parameters if name.startswith(tuple(groups))}
    assert parameters - grouped - {"config", "log_format"} == set(PruneConfig.model_fields) - {"options"} | {"option"}
    for prefix, group in groups.items():
        assert {name.removeprefix(prefix) for name in grouped if name.startswith(prefix)} <= set(group.model_fields)


def test_the_effective_configuration_is_read_back_as_it_was(yaml_file):
    for config in (load_config(None, VALUES), load_config(None, {"model": "m", "output": "o"})):
        assert load_config(yaml_file(config.to_yaml()), {}) == config


def test_overrides_count_more_than_yaml_except_where_they_are_none(yaml_file):
    file = yaml_file({"model": "m", "output": "o", "sparsity": 0.5, "align": 16})
    config = load_config(file, {"sparsity": 0.25, "align": None, "overwrite": False})
    assert (config.sparsity, config.align, config.overwrite) == (0.25, 16, False)


def test_hyperparameters_are_overridden_one_by_one(yaml_file):
    file = yaml_file({"model": "m", "output": "o", "options": {"k": 1.0, "percdamp": 0.1}})
    assert load_config(file, {"options": {"k": 2.0}}).options == {"k": 2.0, "percdamp": 0.1}


@pytest.mark.parametrize(
    ("in_file", "given", "expected"),
    [
        (True, None, DistillConfig()),
        (False, None, None),
        ({"epochs": 2, "batch": 4}, {"epochs": 3}, DistillConfig(epochs=3, batch=4)),
        ({"epochs": 2}, {}, DistillConfig(epochs=2)),
        ({"epochs": 2}, False, None),
        (True, {"epochs": 3}, DistillConfig(epochs=3)),
        (None, {}, DistillConfig()),
    ],
)
def test_distillation_is_a_switch_or_options_overridden_one_by_one(yaml_file, in_file, given, expected):
    file = yaml_file({"model": "m", "output": "o", "distill": in_file})
    assert load_config(file, {"distill": given}).distill == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("sparsty: 0.2", "'sparsty' is not an option. Options: model, output, "),
        ("1: 2", "'1' is not an option"),
        ("sparsity: lots", "option 'sparsity' is 'lots': .*number"),
        ("sparsity:", "option 'sparsity' is None: .*number"),
        ("sparsity: 1.2", "option 'sparsity' is 1.2: .*less than 1"),
        ("sparsity: 30", r"option 'sparsity' is 30: .*less than 1\. Write 30% as 0\.3\."),
        ("sparsity: -0.1", "option 'sparsity' is -0.1: .*greater than or equal to 0"),
        ("sparsity: .nan", "option 'sparsity' is nan: "),
        ("target: speed", "option 'target' is 'speed': .*'bytes' or 'latency'"),
        ("layout: even", "option 'layout' is 'even': .*'free', 'heterogeneous' or 'stock'"),
        ("align: 0", "option 'align' is 0: "),
        ("device: tpu", "option 'device' is 'tpu': .*'auto', 'cpu' or 'cuda'"),
        ("options: [k, 2]", r"option 'options' is \['k', 2\]: .*dictionary"),
        ("propagation: 0", "option 'propagation' is 0: give a number of layers from 1, or 'full'"),
        ("propagation: some", "option 'propagation' is 'some': give a number of layers from 1, or 'full'"),
        ("distill: {epoch: 2}", "'distill.epoch' is not an option. Options: objective, calibration, epochs, "),
        ("distill: {epochs: 0}", "option 'distill.epochs' is 0: .*greater than or equal to 1"),
        ("distill: {train: half}", "option 'distill.train' is 'half': .*'full' or 'lora'"),
        ("workers: 0", "option 'workers' is 0: give a number from 1, or 'MIN:MAX'"),
        ("workers: 3:2", "option 'workers' is '3:2': give a number from 1, or 'MIN:MAX'"),
        ("- model", "must be a mapping of option names to values"),
        ("just a text", "must be a mapping of option names to values"),
        ("", "must be a mapping of option names to values"),
        ("model: [", "is not valid YAML"),
    ],
)
def test_what_is_wrong_in_a_yaml_file_is_named_with_the_file(yaml_file, content, message):
    file = yaml_file(content)
    with pytest.raises(InputError, match=rf"run\.yaml: {message}"):
        load_config(file, {"model": "m", "output": "o"})


def test_a_wrong_override_is_not_blamed_on_the_file(yaml_file):
    with pytest.raises(InputError, match=r"^option 'sparsity' is 1\.2"):
        load_config(yaml_file({"model": "m", "output": "o", "sparsity": 0.5}), {"sparsity": 1.2})


def test_a_missing_file_and_missing_options_are_named(tmp_path, yaml_file):
    with pytest.raises(InputError, match=r"none\.yaml: can't be read \(No such file or directory\)"):
        load_config(tmp_path / "none.yaml", {})
    with pytest.raises(InputError, match=r"^option 'output' must be given"):
        load_config(None, {"model": "m"})
    with pytest.raises(InputError, match=r"^option 'model' must be given"):
        load_config(yaml_file({"output": "o"}), {})


def test_workers_are_a_number_or_a_range(yaml_file):
    def given(content) -> tuple:
        return load_config(yaml_file(f"model: m\noutput: o\n{content}"), {}).worker_range()

    ranges = [given(content) for content in ("", "workers: 4", "workers: 2:8", "workers: '3'")]
    assert ranges == [(1, None), (1, 4), (2, 8), (1, 3)]


def test_blocks_are_as_long_as_propagation_says_and_the_model_is():
    def length(propagation) -> int:
        return PruneConfig(model="m", output="o", propagation=propagation).block_length(10)

    assert [length(propagation) for propagation in (1, 3, 10, 99, "full", "3")] == [1, 3, 10, 10, 10, 3]


def test_what_decides_the_result_leaves_out_placement_and_what_is_known_by_content_alone():
    base = PruneConfig(model="m", output="o")
    same, different = set(), set()
    for name, value in VALUES.items():
        changed = PruneConfig.model_validate({"model": "m", "output": "o", name: value})
        (same if changed.decisive() == base.decisive() else different).add(name)
    assert same == {*PLACEMENT, "model", "calibration", "revision", "latency_table", "from_library"}
    assert different == set(VALUES) - same
    texts = [PruneConfig(model="m", output="o", distill={"calibration": path}).decisive() for path in ("x", "y", None)]
    assert texts[0] == texts[1] == texts[2]


def test_what_the_layout_free_was_called_stays_its_name():
    assert PruneConfig(model="m", output="o", layout="per-layer").layout == "free"
