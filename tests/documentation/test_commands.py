"""Every command of the documentation is one that works.

- What `distprune` is told is parsed by the program itself, and its configuration is validated, for every command.
- All but those in :data:`ONLY_CHECKED` are also executed, on tiny models and without Ray.
- Arguments of scripts are parsed by the scripts' own parsers.
- What can't be run in a test stands in :data:`NOT_RUN`, with the reason.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import NoReturn

import pytest
from markdown_pages import PAGES, ROOT, Command, commands
from typer.main import get_command
from typer.testing import CliRunner, Result

from distprune.cli import app
from distprune.config import PruneConfig
from distprune.methods import make_method

#: Beginnings of commands that no test runs, and why.
NOT_RUN = {
    "pip install": "changes the environment, and needs the network",
    "scripts/demo.sh": "makes an environment of its own, and prunes a real model",
    "scripts/test.sh": "runs all tests",
    "ray get-auth-token": "writes to the home folder; tests/cluster/test_by_hand.py does it in another",
    "ray start": "starts a cluster; tests/cluster/test_by_hand.py does it",
    "ray stop": "ends every Ray on the machine, that of other tests included",
    "ray job submit": "needs a cluster; tests/cluster/test_jobs.py submits jobs, and the command in it is checked here",
    "export RAY_AUTH_MODE": "is of the shell alone",
    "vllm serve": "vLLM has an environment of its own; scripts/serve_check.sh serves models",
}
#: Words that make a command one that is checked as far as its configuration but not executed, and why.
ONLY_CHECKED = {
    "compare": "starts a process for every model, of which there are a dozen",
    "--tasks": "their questions are not on this machine; tests/evaluation runs tasks that are",
    "--speed": "measures for a minute; tests/evaluation/test_speed.py runs it",
    "--workers": "starts Ray; tests/evaluation/test_workers.py runs it",
    "--push-to-hub": "uploads to the hub; tests/checkpoint/test_upload.py uploads to a stand-in",
    "--offload": "is an option of a plan, which takes seconds; the other plan is executed",
    "plan-from": "needs the library of another command; tests/engine/test_search.py makes one",
    "quiet-neurons": "is a plugin, which test_plugin.py installs and runs",
}
#: What stands in a command for something that is not on this machine.
STAND_INS = {
    "meta-llama/Llama-3.1-70B": "MODEL",
    "meta-llama/Llama-3.1-405B": "MODEL",
    "s3://models/llama-70b": "MODEL",
    "s3://models/calib.arrow": "calib.arrow",
    "s3://models/llama-70b-30": "pruned",
}
RUN_FILE = "model: MODEL\noutput: pruned\nsparsity: 0.3\ncalibration: calib.arrow\n"

ALL = list(commands())


def of_distprune(command: Command) -> list[str]:
    """What a command tells `distprune`, be it after that of another program."""
    words = list(command.words)
    if words[:3] == ["ray", "job", "submit"]:
        words = words[words.index("--") + 1 :]
    return words[1:] if words[0] == "distprune" else []


#: The first of those that are the same on several pages.
DISTPRUNE = list({(*of_distprune(each),): each for each in reversed(ALL) if of_distprune(each)}.values())


def is_executed(command: Command) -> bool:
    return command.words[0] == "distprune" and not ONLY_CHECKED.keys() & {*command.words}


def run(words: list[str]) -> Result:
    return CliRunner().invoke(app, words, prog_name="distprune")


# ---------------------------------------------------------------- all are of a known kind


@pytest.mark.parametrize("command", ALL, ids=str)
def test_a_command_is_checked_or_stands_in_the_table(command):
    line = " ".join(command.words)
    is_python = command.words[:2] == ("python", "-c") or line.startswith("python scripts/")
    assert of_distprune(command) or is_python or any(line.startswith(beginning) for beginning in NOT_RUN)


def test_the_table_has_nothing_that_no_page_says():
    lines = [" ".join(command.words) for command in ALL]
    assert not [beginning for beginning in NOT_RUN if not any(line.startswith(beginning) for line in lines)]


# ---------------------------------------------------------------- distprune


class Reached(Exception):
    """Ends a command whose configuration is valid."""


def stop(*_: object, **__: object) -> NoReturn:
    raise Reached


def stop_with_a_method(config: PruneConfig, *_: object, **__: object) -> NoReturn:
    if config.method != "quiet-neurons":
        make_method(config.method, config.options)
    raise Reached


@pytest.fixture
def no_work(monkeypatch) -> None:
    """Ends every command where its work would begin."""
    for work in (
        "distprune.calibration.build_calibration",
        "distprune.comparison.comparing.connected",
        "distprune.evaluation.evaluate_models",
        "distprune.latency.model_latency.measure_model",
        "distprune.engine.status",
        "distprune.engine.load_record",
        "distprune.engine.Library.read",
        "distprune.export.gguf_file.export",
    ):
        monkeypatch.setattr(work, stop)
    for work in ("distprune.engine.prune", "distprune.planning.plan_run"):
        monkeypatch.setattr(work, stop_with_a_method)


@pytest.mark.parametrize("command", DISTPRUNE, ids=str)
def test_a_command_is_parsed_and_its_configuration_valid(command, here, no_work, monkeypatch):
    (here / "run.yaml").write_text(RUN_FILE)
    if command.block.page.parent.name == "cluster":
        monkeypatch.chdir(ROOT / "cluster" / "runs")
    result = run(of_distprune(command))
    assert isinstance(result.exception, Reached) or result.exit_code == 0, result.output


@pytest.mark.parametrize("command", [command for command in DISTPRUNE if is_executed(command)], ids=str)
def test_a_command_works(command, here):
    (here / "run.yaml").write_text(RUN_FILE)
    words = [STAND_INS.get(word, word) for word in of_distprune(command)]
    if words[0] == "prune":
        words += ["--overwrite", "--device", "cpu", "--workers", "1"]
    if words[0] == "measure-latency":
        words += ["--rounds", "1"]
    result = run(words)
    assert result.exit_code == 0, result.output
    if command.writes:
        assert result.stdout


# ---------------------------------------------------------------- scripts


class Parsed(Exception):
    """Ends a script whose arguments are understood."""


@pytest.fixture
def parse(monkeypatch) -> Callable[[str, list[str]], None]:
    """Lets a script parse its arguments, and do no more."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(*arguments, **options) -> NoReturn:
        parse_args(*arguments, **options)
        raise Parsed

    def run_script(script: str, words: list[str]) -> None:
        module = import_module(Path(script).stem)
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        monkeypatch.setattr(sys, "argv", [script, *words])
        with pytest.raises(Parsed):
            getattr(module, "parse_arguments", module.main)()

    return run_script


def of_scripts() -> list[tuple[str, ...]]:
    """Commands of scripts in Python, in blocks and in prose."""
    in_prose = [tuple(span.split()) for page in PAGES for span in page.spans if span.startswith("python scripts/")]
    in_blocks = [command.words for command in ALL if command.words[0] == "python" and command.words[1] != "-c"]
    return sorted({*in_prose, *in_blocks})


@pytest.mark.parametrize("words", of_scripts(), ids=" ".join)
def test_a_script_understands_its_arguments(words, parse):
    parse(words[1], list(words[2:]))


@pytest.mark.parametrize("command", [command for command in ALL if command.words[:2] == ("python", "-c")], ids=str)
def test_python_in_a_command_runs(command, capsys):
    exec(compile(command.words[2], str(command.block), "exec"), {})
    assert capsys.readouterr().out


# ---------------------------------------------------------------- options in prose


def known_options() -> set[str]:
    """Those of all commands of `distprune`, and what the scripts in Python and in the shell say of theirs."""
    program = get_command(app)
    options = {
        name
        for command in program.commands.values()
        for parameter in command.params
        for name in (*parameter.opts, *parameter.secondary_opts)
    }
    scripts = "".join(file.read_text() for file in (ROOT / "scripts").iterdir() if file.is_file())
    return options | {word for word in scripts.replace('"', " ").replace("`", " ").split() if word.startswith("--")}


#: Options of other programs that the pages speak of.
OF_OTHERS = {
    "--node-manager-port", "--object-manager-port", "--min-worker-port", "--max-worker-port", "--block",
    "--secret", "--distill-",
}  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_options_that_are_named_exist(page):
    named = {word.partition("=")[0] for span in page.spans for word in span.split() if word.startswith("--")}
    assert not named - known_options() - OF_OTHERS - {"--"}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_commands_that_are_named_exist(page):
    named = {span.split()[1] for span in page.spans if span.startswith("distprune ") and len(span.split()) > 1}
    assert not named - set(get_command(app).commands)
