"""Options and arguments that several commands share.

Those of runs are None where the command line doesn't give them, so that the YAML file of ``--config`` can.
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Optional

import typer

SOURCE = "text, JSON, CSV or Parquet file, or dataset name"
DTYPES = "auto (the checkpoint's where the hardware supports it natively), float32, bfloat16 or float16"

# ------------------------------------------------------------------ the model

Model = Annotated[str, typer.Argument(metavar="MODEL", help="local Hugging Face folder, hub id or .gguf file")]
OptionalModel = Annotated[Optional[str], typer.Argument(metavar="MODEL", help="folder, hub id or .gguf file")]
Revision = Annotated[Optional[str], typer.Option(help="branch, tag or commit of a hub model")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="run code that comes with the model")]
OptionalTrust = Annotated[
    Optional[bool],
    typer.Option("--trust-remote-code/--no-trust-remote-code", help="run code that comes with the model"),
]

# ------------------------------------------------------------------ what is pruned

Config = Annotated[Optional[Path], typer.Option(help="YAML file of options; the command line overrides the file")]
Method = Annotated[Optional[str], typer.Option(help="pruning method [curvature]")]
MethodOptions = Annotated[
    Optional[list[str]], typer.Option(metavar="NAME=VALUE", help="hyperparameter of the method; repeatable")
]
Sparsity = Annotated[Optional[float], typer.Option(help="fraction of decoder parameters to remove [0.2]")]
Target = Annotated[
    Optional[str],
    typer.Option(
        metavar="RESOURCE",
        help="what --sparsity is a fraction of: parameters, active-parameters, flops, kv-cache, bytes, latency "
        "[parameters]",
    ),
]
LatencyTable = Annotated[
    Optional[str],
    typer.Option(metavar="FILE", help="for --target latency: what distprune measure-latency has made of the model"),
]
CountEmbeddings = Annotated[
    Optional[bool],
    typer.Option(
        "--count-embeddings/--no-count-embeddings",
        help="--sparsity is a fraction of all parameters, embeddings included",
    ),
]
Layout = Annotated[
    Optional[str],
    typer.Option(
        metavar="free|heterogeneous|stock",
        help="free: anything; heterogeneous: heads and FFN widths per layer, as transformers' per_layer_config says "
        "them; stock: same widths in all layers, a plain checkpoint [free]",
    ),
]
Align = Annotated[Optional[int], typer.Option(help="widths and ranks are multiples of this [8]")]
Propagation = Annotated[
    Optional[str],
    typer.Option(
        metavar="NUMBER|full",
        help="layers per block, within which each is pruned on the outputs of the pruned ones before it [full]",
    ),
]

Rounds = Annotated[
    Optional[int],
    typer.Option(help="times the model is planned and pruned, each after the first by what the pruned model shows [1]"),
]

# ------------------------------------------------------------------ search

Search = Annotated[
    Optional[bool],
    typer.Option("--search/--no-search", help="refine the plan by measuring it on windows that are held out [no]"),
]
SearchSteps = Annotated[Optional[int], typer.Option(help="times that all parts are measured [2]")]
SearchSeconds = Annotated[
    Optional[float], typer.Option(help="no step begins after so long, and results may then differ [no limit]")
]
SearchSamples = Annotated[
    Optional[int], typer.Option(help="windows of the calibration set to hold out [a quarter, 32 at most]")
]
SearchCalibration = Annotated[
    Optional[str], typer.Option(help="calibration set to measure on, in place of held-out windows")
]
Library = Annotated[
    Optional[str],
    typer.Option(metavar="FOLDER", help="keep the parts that the search solves there, for distprune plan-from"),
]
FromLibrary = Annotated[
    Optional[str],
    typer.Option(metavar="FOLDER", help="take all parts from the library of an earlier search, and solve nothing"),
]

# ------------------------------------------------------------------ calibration

Field = Annotated[Optional[str], typer.Option(help="field that holds a record's text or messages")]
CalibrationFile = Annotated[
    Optional[str], typer.Option(help="calibration set, an Arrow file [samples that the model generates]")
]
Samples = Annotated[Optional[int], typer.Option(help="samples to generate without --calibration [128]")]
SequenceLength = Annotated[Optional[int], typer.Option(help="tokens in each generated sample [128]")]
Seed = Annotated[Optional[int], typer.Option(help="seed of the generated samples [0]")]

# ------------------------------------------------------------------ distillation

Distill = Annotated[
    Optional[bool],
    typer.Option("--distill/--no-distill", help="train the pruned layers to match the dense model [no]"),
]
DistillObjective = Annotated[
    Optional[str],
    typer.Option(
        metavar="layers|logits", help="train each layer alone, or all together on the model's predictions [layers]"
    ),
]
DistillCalibration = Annotated[
    Optional[str], typer.Option(help="calibration set for distillation, which may be larger [that of --calibration]")
]
DistillEpochs = Annotated[Optional[int], typer.Option(help="passes over the samples [1]")]
DistillLearningRate = Annotated[
    Optional[float], typer.Option(help="peak learning rate of AdamW [0.0005; logits: 0.001]")
]
DistillTrain = Annotated[
    Optional[str], typer.Option(metavar="full|lora", help="all weights, or low-rank updates [full; logits: lora]")
]
DistillLookAhead = Annotated[
    Optional[int], typer.Option(help="following dense layers whose outputs also count in a layer's loss [1]")
]

# ------------------------------------------------------------------ computing

MicroBatch = Annotated[Optional[int], typer.Option(help="samples in one forward pass [16]")]
ExpertsAtOnce = Annotated[
    Optional[int], typer.Option(help="experts of a mixture that a worker holds at once [all of a layer]")
]
Dtype = Annotated[Optional[str], typer.Option(help=f"{DTYPES} [auto]")]
Device = Annotated[Optional[str], typer.Option(help="auto, cpu or cuda [auto]")]
Offload = Annotated[
    Optional[bool],
    typer.Option("--offload/--no-offload", help="solve layers in host memory, for GPUs that are too small [no]"),
]
Workers = Annotated[
    Optional[str],
    typer.Option(metavar="MAX|MIN:MAX", help="worker actors [one per GPU, or per --threads-per-worker CPUs]"),
]
ThreadsPerWorker = Annotated[Optional[int], typer.Option(help="CPU threads of each worker [1]")]
GpusPerWorker = Annotated[Optional[float], typer.Option(help="GPUs that each worker requests [1 on cuda]")]
Address = Annotated[Optional[str], typer.Option(help="Ray cluster to join [RAY_ADDRESS or a local one]")]
Weights = Annotated[
    Optional[str],
    typer.Option(
        metavar="auto|shared|served|hub",
        help="where workers read the model: in its folder, from the driver, or from the hub [auto]",
    ),
]

# ------------------------------------------------------------------ output

Writes = Annotated[
    Optional[str],
    typer.Option(
        metavar="auto|driver",
        help="finished layers are written by workers that see the output, or by the driver [auto]",
    ),
]
MaxShardSize = Annotated[Optional[int], typer.Option(help="maximum bytes of one safetensors file [5000000000]")]
PushToHub = Annotated[
    Optional[str],
    typer.Option(
        metavar="REPOSITORY", help="upload the result to the Hugging Face hub; NAMESPACE/ names it by the model's name"
    ),
]
HubIgnore = Annotated[
    Optional[list[str]],
    typer.Option(metavar="PATTERN", help="files to keep out of the upload, besides the run's log; repeatable"),
]
Private = Annotated[
    Optional[bool], typer.Option("--private/--public", help="who sees a repository that has to be made [private]")
]
Overwrite = Annotated[Optional[bool], typer.Option("--overwrite/--no-overwrite", help="replace an existing output")]
Restart = Annotated[
    Optional[bool],
    typer.Option("--restart/--no-restart", help="start over instead of resuming an unfinished run"),
]


class LogFormatName(str, Enum):
    """How a run reports what it does: progress for people, or events for programs."""

    text = "text"
    json = "json"
