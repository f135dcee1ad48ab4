"""A run whose result goes to the hub is made on this machine, and uploaded when it is done."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from local_hub import ACCOUNT, Hub, join, serving

from distprune import InputError, PruneConfig, suggested_name
from distprune.calibration import open_calibration, write_calibration
from distprune.engine import driver
from distprune.engine.run.hub_output import prune_to_hub
from distprune.errors import InterruptedWhenDone, StorageFailed

REPOSITORY = "org/pruned"


@pytest.fixture
def hub(llama, monkeypatch, tmp_path):
    monkeypatch.setenv("DISTPRUNE_CACHE", str(tmp_path / "cache"))
    with serving(llama) as hub:
        join(hub, tmp_path / "hub cache", monkeypatch)
        yield hub


@pytest.fixture
def runs(monkeypatch) -> list:
    """The runs that were made, as distinct from results that were found."""
    made, original = [], driver.prune_job
    monkeypatch.setattr(driver, "prune_job", lambda *job: made.append(job) or original(*job))
    return made


def contents(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def without_log(files: dict[str, bytes]) -> dict[str, bytes]:
    """What of a result is uploaded."""
    return {name: content for name, content in files.items() if name != "distprune_log.jsonl"}


def weights(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name.endswith((".safetensors", ".md"))}


# ------------------------------------------------------------------ --output hf://


def test_an_output_on_the_hub_is_uploaded_and_nothing_stays_here(prune_here, hub, tmp_path):
    record = prune_here(f"hf://{REPOSITORY}")
    prune_here(tmp_path / "pruned")
    assert weights(hub.repositories[REPOSITORY]) == weights(contents(tmp_path / "pruned"))
    assert record.decoder_sparsity > 0.2
    assert list((tmp_path / "cache" / "outputs").iterdir()) == []
    with pytest.raises(InputError, match="hf://org/pruned exists"):
        prune_here(f"hf://{REPOSITORY}")


def test_what_could_not_be_uploaded_is_not_pruned_again_unless_it_is_another(prune_here, hub, runs):
    hub.full = True
    for sparsity, made in ((0.3, 1), (0.3, 1), (0.4, 2)):
        with pytest.raises(StorageFailed, match="can't be reached"):
            prune_here(f"hf://{REPOSITORY}", sparsity=sparsity)
        assert len(runs) == made
    hub.full = False
    assert prune_here(f"hf://{REPOSITORY}", sparsity=0.4).sparsity_asked == 0.4
    assert len(runs) == 2


# ------------------------------------------------------------------ --push-to-hub


def test_a_result_is_pushed_and_stays_here(prune_here, hub, tmp_path):
    prune_here(tmp_path / "pruned", push_to_hub=REPOSITORY)
    assert hub.repositories[REPOSITORY] == without_log(contents(tmp_path / "pruned"))
    assert "distprune_log.jsonl" in contents(tmp_path / "pruned")
    assert hub.private[REPOSITORY]
    *before, last = hub.commits
    assert last == ["config.json"] and not any("config.json" in commit for commit in before)
    # The configuration beside the result uploads nothing by itself.
    assert b"push_to_hub: null" in hub.repositories[REPOSITORY]["distprune_config.yaml"]


def test_a_namespace_gets_a_repository_of_the_suggested_name(prune_here, hub, tmp_path):
    record = prune_here(tmp_path / "pruned", push_to_hub="hf://org/", private=False)
    assert hub.private == {f"org/{suggested_name(record)}": False}


def test_a_result_that_could_not_be_pushed_is_pushed_by_the_same_command_without_pruning(
    prune_here, hub, runs, tmp_path
):
    options = {"output": tmp_path / "pruned", "push_to_hub": REPOSITORY, "workers": 1}
    hub.full = True
    with pytest.raises(StorageFailed, match=r"can't be reached.*\(The result is in .*pruned"):
        prune_here(**options)
    assert "config.json" not in hub.repositories[REPOSITORY]
    made = contents(tmp_path / "pruned")
    hub.full = False
    prune_here(**options | {"workers": 2, "private": False})
    assert len(runs) == 1
    assert made == contents(tmp_path / "pruned")
    assert hub.repositories[REPOSITORY] == without_log(made)


def test_files_that_match_a_pattern_stay_here_and_change_nothing_else(prune_here, hub, tmp_path):
    prune_here(tmp_path / "all", push_to_hub="org/all")
    prune_here(tmp_path / "few", push_to_hub="org/few", hub_ignore=["distprune_*", "*.md"])
    kept_back = {"distprune_config.yaml", "distprune_run.json", "README.md"}
    assert hub.repositories["org/all"].keys() - hub.repositories["org/few"].keys() == kept_back
    assert kept_back < contents(tmp_path / "few").keys()
    assert b"hub_ignore: []" in (tmp_path / "few" / "distprune_config.yaml").read_bytes()


@pytest.mark.parametrize(("pattern", "file"), [("*.json", "config.json"), ("model*", "model.safetensors"), ("*", ".*")])
def test_a_pattern_that_keeps_back_what_opens_the_model_is_refused_before_pruning(
    prune_here, hub, runs, tmp_path, pattern, file
):
    with pytest.raises(InputError, match=rf"hub_ignore: '{re.escape(pattern)}' would keep {file} out of the upload"):
        prune_here(tmp_path / "pruned", push_to_hub=REPOSITORY, hub_ignore=[pattern])
    assert runs == []


def test_what_is_sent_once_is_not_sent_again(prune_here, hub, tmp_path):
    prune_here(tmp_path / "pruned", push_to_hub="org/first")
    hub.full = True  # it takes no large file any more, and needs none
    prune_here(tmp_path / "pruned", push_to_hub="org/second")
    assert hub.repositories["org/first"] == hub.repositories["org/second"]


@pytest.mark.parametrize("changed", ["sparsity", "model", "calibration"])
def test_the_result_of_another_run_is_never_pushed(prune_here, hub, llama, calibrate, tmp_path, changed):
    model = shutil.copytree(llama, tmp_path / "model")
    calibration = Path(shutil.copyfile(calibrate(llama), tmp_path / "calibration.arrow"))
    options = {"output": tmp_path / "pruned", "model": model, "calibration": calibration}
    prune_here(**options)
    if changed == "sparsity":
        options["sparsity"] = 0.4
    elif changed == "model":
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.01}))
    else:
        found = open_calibration(calibration)
        tokens = np.array(found.tokens)[::-1].copy()
        del found
        metadata = open_calibration(calibrate(llama)).metadata
        write_calibration(calibration, tokens, metadata)
    with pytest.raises(InputError, match=r"pruned exists\. Choose another output"):
        prune_here(**options, push_to_hub=REPOSITORY)
    assert hub.repositories == {}


def test_a_restart_prunes_anew(prune_here, hub, runs, tmp_path):
    prune_here(tmp_path / "pruned")
    prune_here(tmp_path / "pruned", push_to_hub=REPOSITORY, overwrite=True, restart=True)
    assert len(runs) == 2


@pytest.mark.parametrize(
    ("options", "account", "reason"),
    [
        ({"push_to_hub": "others/x"}, ACCOUNT, "and not of others"),
        ({"push_to_hub": "library/"}, ACCOUNT, "may only read in library"),
        ({"push_to_hub": "org/x"}, ACCOUNT | {"auth": {"accessToken": {"role": "read"}}}, "may not write there"),
        ({"push_to_hub": "a/b/c"}, ACCOUNT, "is no repository"),
        ({"push_to_hub": "org/x", "output": "hf://org/y"}, ACCOUNT, "the output is on the hub already"),
        ({"push_to_hub": "org/x", "output": "memory://bucket/y"}, ACCOUNT, "must be a folder of this machine"),
    ],
)
def test_what_can_not_be_pushed_is_refused_before_anything_is_done(
    prune_here, hub, runs, tmp_path, options, account, reason
):
    hub.account = account
    with pytest.raises(InputError, match=reason):
        prune_here(**{"output": tmp_path / "pruned"} | options)
    assert runs == [] and hub.repositories == {}
    assert not (tmp_path / "pruned").exists() and not (tmp_path / "pruned.partial").exists()


def test_a_repository_that_has_a_model_is_refused_before_anything_is_done(prune_here, hub: Hub, runs, tmp_path):
    hub.repositories[REPOSITORY] = {"config.json": b"{}"}
    with pytest.raises(InputError, match="hf://org/pruned exists"):
        prune_here(tmp_path / "pruned", push_to_hub=REPOSITORY)
    assert runs == []
    prune_here(tmp_path / "pruned", push_to_hub=REPOSITORY, overwrite=True)
    assert hub.repositories[REPOSITORY] == without_log(contents(tmp_path / "pruned"))


def test_a_signal_between_the_result_and_its_upload_interrupts_the_run(hub, llama, tmp_path):
    config = PruneConfig(model=str(llama), output=tmp_path / "pruned", push_to_hub=REPOSITORY)

    def prune_and_be_interrupted(_):
        raise InterruptedWhenDone(record=None)

    with pytest.raises(KeyboardInterrupt) as raised:
        prune_to_hub(config, prune_and_be_interrupted)
    assert type(raised.value) is KeyboardInterrupt  # the command line takes the other kind for success
    assert hub.repositories == {}
