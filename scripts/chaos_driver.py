"""The driver of a run as a process that can really be killed, and what it is asked to prune."""

from __future__ import annotations

import faulthandler
import itertools
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedTokenizerFast

from distprune.calibration import CalibrationMetadata, load_tokenizer, tokenizer_fingerprint, write_calibration

# Every driver is forked from a server that has long imported everything: it lives and dies like any other process, and
# is up in a moment.
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["distprune.cli", "distprune.engine.driver", "distprune.reporting"])

LAYERS = 8


@dataclass(frozen=True)
class Setting:
    """What a run is told that decides its result."""

    method: str
    propagation: str
    distill: str | None
    experts_at_once: int | None = None

    def __str__(self) -> str:
        distilled = f", distilled by {self.distill}" if self.distill else ""
        chunks = f", {self.experts_at_once} experts at once" if self.experts_at_once else ""
        return f"{self.method}, propagation {self.propagation}{distilled}{chunks}"

    @property
    def arguments(self) -> list[str]:
        distill = []
        if self.distill:
            distill = ["--distill-objective", self.distill, "--distill-learning-rate", "0.001"]
        chunks = ["--experts-at-once", str(self.experts_at_once)] if self.experts_at_once else []
        return ["--method", self.method, "--propagation", self.propagation, *distill, *chunks]

    @property
    def steps(self) -> int:
        """Layers in all stages."""
        return LAYERS * (2 + (self.method == "curvature") + bool(self.distill))


METHODS, OBJECTIVES = ("curvature", "olica", "oops"), (None, "layers", "logits")
SETTINGS = [Setting(*choice) for choice in itertools.product(METHODS, ("1", "2", "full"), OBJECTIVES)]
MIXTURE_SETTINGS = [
    *(Setting(*choice) for choice in itertools.product(("curvature", "slimgpt"), ("1", "2", "full"), (None,), (2,))),
    *(Setting(*choice) for choice in itertools.product(("curvature", "reap"), ("2", "full"), OBJECTIVES)),
]


class Driver:
    """``distprune ARGUMENTS`` in a process of its own; what it prints goes to the end of ``log``."""

    def __init__(self, arguments: Sequence[str], log: Path):
        self._process = FORK.Process(target=run_command_line, args=(list(arguments), log))
        self._process.start()

    @property
    def is_alive(self) -> bool:
        return self._process.is_alive()

    @property
    def exit_status(self) -> int:
        return self._process.exitcode

    def send(self, sent: signal.Signals) -> bool:
        """Whether there was still a process to send the signal to."""
        if not self.is_alive:
            return False
        os.kill(self._process.pid, sent)
        return True

    def tell_where_it_is(self) -> None:
        """Let it write the stacks of its threads into its log."""
        if self.send(signal.SIGUSR1):
            time.sleep(1)

    def end(self) -> None:
        if self.is_alive:
            self._process.kill()
        self._process.join()


def write_output_to(file: str | Path) -> None:
    """Let this process print to the end of a file."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


def run_command_line(arguments: list[str], log: Path) -> None:
    write_output_to(log)
    # Where the script runs in the background, SIGINT is ignored, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    sys.argv = ["distprune", *arguments]
    from distprune.cli import main

    main()


def make_model(folder: Path, mixture: bool = False) -> None:
    """A Llama with grouped-query attention, or a Mixtral likewise, small and random, and a tokenizer for it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=288, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["The river runs down to the sea."], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    torch.manual_seed(0)
    experts = {"num_local_experts": 6, "num_experts_per_tok": 2} if mixture else {}
    config = (MixtralConfig if mixture else LlamaConfig)(
        **experts,
        hidden_size=64,
        intermediate_size=64 if mixture else 192,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_calibration(model: Path, file: Path, samples: int = 48, length: int = 32) -> None:
    """Random windows."""
    tokenizer = load_tokenizer(model)
    tokens = np.random.default_rng(0).integers(len(tokenizer), size=(samples, length), dtype=np.int32)
    about = CalibrationMetadata(tokenizer_fingerprint(tokenizer), len(tokenizer), length, ("random",), 0, False)
    write_calibration(file, tokens, about)
