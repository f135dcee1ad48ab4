"""``distprune plan-from``."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from distprune import api
from distprune.cli import options as opt
from distprune.cli.consoles import display, output_console
from distprune.cli.interrupts import ignore_signals


def plan_from(
    library: Annotated[
        str, typer.Argument(metavar="LIBRARY", help="folder that distprune prune --search --library has made")
    ],
    output: Annotated[
        str, typer.Option("--output", "-o", help="folder of the pruned checkpoint, or its s3:// or gs:// URL")
    ],
    model: Annotated[
        Optional[str], typer.Option(help="where the model is that the library is of [where it was then]")
    ] = None,
    sparsity: Annotated[
        Optional[float], typer.Option(help="fraction of decoder parameters to remove [the library's]")
    ] = None,
    target: opt.Target = None,
    latency_table: opt.LatencyTable = None,
    count_embeddings: opt.CountEmbeddings = None,
    workers: opt.Workers = None,
    threads_per_worker: opt.ThreadsPerWorker = None,
    address: opt.Address = None,
    max_shard_size: opt.MaxShardSize = None,
    overwrite: opt.Overwrite = None,
    restart: opt.Restart = None,
) -> None:
    """Make another checkpoint from the library of a search, of any size, without solving again."""
    given = dict(locals())
    from distprune.engine.telemetry.harmless import harmless
    from distprune.reporting import parameter_table, place_line
    from distprune.storage import location

    record = api.plan_from(progress=display(), **given)
    ignore_signals()
    with harmless("standard output"):
        output_console.print(parameter_table(record))
        output_console.print(place_line(location(output)), highlight=False, markup=False)
