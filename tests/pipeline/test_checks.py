"""Bad input ends a pipeline before its long work, with one message."""

from __future__ import annotations

from pathlib import Path

import pytest

from distprune import InputError
from distprune.checkpoint import hub_access
from distprune.pipeline import contents


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "./none"}, r"none does not exist\. Give a checkpoint folder"),
        ({"revision": "main"}, r"is not on the hub, so it has no revision main\. Leave the revision out"),
        ({"calibration": "none.arrow"}, r"none\.arrow: no such calibration set"),
        ({"calibration": {"text": "none.txt"}}, r"none\.txt: no such file"),
        ({"calibration": {"samples": 2, "sequence_length": 65}}, r"calibrate: .*65"),
        ({"distill": {"calibration": {"text": "none.jsonl"}}}, r"none\.jsonl: no such file"),
        ({"evaluate": {"text": "none.txt"}}, r"none\.txt: no such file"),
        ({"evaluate": {"text": "TEXT", "sequence_length": 65}}, r"evaluate: .*65"),
        (
            {"evaluate": {"text": "TEXT", "max_tokens": 20, "sequence_length": 32}},
            r"evaluate: .*text\.txt: has 20 tokens",
        ),
        ({"evaluate": {"tasks": ["arc_eazy"]}}, r"evaluate: --tasks arc_eazy: lm-eval has no such task"),
        ({"prune": {"method": "magic"}}, r"method 'magic' does not exist"),
        ({"sparsities": [0.3, 0.99], "prune": {"method": "olica"}}, r"olica at 99%: sparsity 0\.99 can't be reached"),
        ({"prune": {"method": "olica", "options": {"k": "many"}}}, r"option 'k' of method olica"),
        ({"publish": {"to": "s3://no-such-bucket/m"}}, r"publish: s3://no-such-bucket/m: there is no bucket"),
        ({"publish": {"to": "ftps3://x/m"}}, r"publish: ftps3://x/m: Unsupported filesystem"),
        ({"publish": {"to": "hf://org"}}, r"publish: hf://org: the hub asks for a token\. Set HF_TOKEN"),
        (
            {"publish": {"to": "/m", "hub_ignore": "distprune_run*"}},
            r"publish: hub_ignore: 'distprune_run\*' would keep",
        ),
        ({"publish": {"to": "hf://a/b/c"}}, r"publish: hf://a/b/c: is no repository"),
        ({"publish": {"to": "WORK/out"}}, r"publish\.to: '.*work/out' is, holds or lies in work"),
        ({"publish": {"to": "MODEL"}}, r"publish\.to: .* is, holds or lies in model"),
        ({"publish": {"to": "TEXT"}}, r"publish: .*text\.txt exists and is not a folder"),
    ],
)
def test_bad_input_is_refused_before_anything_is_done(
    run_pipeline, settings, work, text_path, calls, s3_environment, monkeypatch, changes, message
):
    monkeypatch.setattr(hub_access, "get_token", lambda: None)
    names = {"TEXT": str(text_path), "MODEL": settings["model"], "WORK/out": str(work / "out")}

    def filled(value):
        if isinstance(value, dict):
            return {key: filled(each) for key, each in value.items()}
        return names.get(value, value) if isinstance(value, str) else value

    with pytest.raises(InputError, match=message):
        run_pipeline(filled(changes))
    assert calls == []
    assert {path.name for path in work.glob("*")} <= {"summary.json"}


def test_bad_input_for_a_pipeline_that_has_worked_is_in_its_summary(run_pipeline, work):
    run_pipeline({"sparsities": [0.3]})
    with pytest.raises(InputError):
        run_pipeline({"sparsities": [0.3], "evaluate": {"text": "none.txt"}})
    summary = (work / "summary.json").read_text()
    assert '"state": "bad input"' in summary
    assert "none.txt: no such file" in summary


def test_a_data_set_is_known_by_its_commit(monkeypatch):
    class Hub:
        def dataset_info(self, name):
            return type("Info", (), {"sha": f"commit of {name}"})

    monkeypatch.setattr(contents, "HfApi", Hub)
    assert contents.digest_of_text("org/texts:plain:train") == "org/texts@commit of org/texts"


def test_a_folder_is_known_by_names_and_contents(tmp_path):
    digests = set()
    for name, text in (("a.yaml", "x"), ("b.yaml", "x"), ("b.yaml", "y")):
        folder = tmp_path / f"{name}{text}"
        folder.mkdir()
        Path(folder, name).write_text(text)
        digests.add(contents.digest_of_folder(folder))
    assert len(digests) == 3
    with pytest.raises(InputError, match="none: no such folder"):
        contents.digest_of_folder(tmp_path / "none")
