"""Everything that can be known to be wrong with a comparison before its work begins."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distprune.budgets import outer_parameters
from distprune.calibration import load_tokenizer
from distprune.calibration.own_samples import opening_token
from distprune.calibration.text_sources import read_source
from distprune.calibration.tokenizer import tokenize
from distprune.calibration.whole_model import check_sequence_length, load_config
from distprune.checkpoint import check_free_space
from distprune.comparison.runs import Run, naming
from distprune.comparison.scoring import Evaluation
from distprune.engine.run.preflight import Job, check_job
from distprune.errors import InputError
from distprune.evaluation.text import whole_text


def check_runs(runs: Sequence[Run]) -> list[Job]:
    """See that every run would be accepted if it stood alone.

    Returns:
        The dense model as a job that takes nothing away, and the runs' jobs.

    Raises:
        InputError: names the run, unless it is something that all runs share.
    """
    jobs = [check_job(runs[0].config.model_copy(update={"sparsity": 0.0}))]
    for run in runs:
        with naming(run.title):
            jobs.append(check_job(run.config))
    return jobs


def check_room(jobs: Sequence[Job], keep: Path) -> None:
    """See that all results fit side by side, the last of them once more in parts."""
    target, outer = jobs[0].target, outer_parameters(jobs[0].architecture)
    size = sum(info.nbytes for info in jobs[0].checkpoint.tensors.values())
    kept = sum((job.target.remaining + outer) / (target.dense + outer) for job in jobs)
    check_free_space(keep, round(size * (kept + 1)))


def check_text(evaluation: Evaluation, dense: Job) -> None:
    """See that the text has a window to evaluate on, and that the model takes windows of this length."""
    length, longest = evaluation.length, dense.architecture.max_length
    if not 2 <= length <= longest:
        raise InputError(f"--evaluation-length {length}: {dense.model_path} takes windows of 2 to {longest} tokens.")
    if evaluation.max_tokens is not None and evaluation.max_tokens < length:
        raise InputError(f"--max-tokens {evaluation.max_tokens}: is less than one window of {length} tokens.")
    tokenizer = load_tokenizer(dense.model_path, dense.config.trust_remote_code)
    text = whole_text(read_source(evaluation.text, evaluation.field), tokenizer)
    tokens = len(tokenize(tokenizer, [text])[0])
    if tokens < length:
        raise InputError(
            f"{evaluation.text}: has {tokens} tokens, fewer than one window of {length}; "
            "give a longer text or a shorter --evaluation-length."
        )


def check_own_samples(dense: Job, output: Path) -> None:
    """See that the model can write its own calibration set, and that there is a place for it."""
    config, model_path = dense.config, dense.model_path
    if output.exists() and not config.overwrite:
        raise InputError(f"{output} exists. Give it as --calibration, choose another --keep, or give --overwrite.")
    check_sequence_length(config.sequence_length, load_config(model_path, config.trust_remote_code), model_path)
    opening_token(load_tokenizer(model_path, config.trust_remote_code), str(model_path))
