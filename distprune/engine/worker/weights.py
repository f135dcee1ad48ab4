"""How each node comes by the model: from a folder it sees, from the hub, or served by the driver's node.

Whichever way it is, the tensors are the same, and so are the bytes of the result.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
from huggingface_hub.utils import disable_progress_bars
from pydantic import TypeAdapter
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import Tensor

from distprune.checkpoint import (
    Checkpoint,
    HubFiles,
    HubModel,
    TensorFiles,
    TensorInfo,
    TensorSource,
    check_free_space,
)
from distprune.config import Way
from distprune.engine.run.preflight import Job
from distprune.engine.scheduler.ray_cluster import WorkerPlan, alive_nodes, count_fitting
from distprune.engine.worker.dense_model import DenseModel
from distprune.engine.worker.host_tensor import HostTensor, fetch, in_pieces, pack, unpack, whole_of
from distprune.errors import InputError

PIECE = 64 * 2**20  # bytes of a file that are served at once
HUB = TypeAdapter(HubModel | None)


@dataclass(frozen=True)
class WeightAccess:
    """What a node must know to come by the model. Small, and without code that came with the model.

    ``content`` is the fingerprint of the model's folder, None where the driver's node has no more than its headers.
    """

    model: DenseModel
    content: str | None
    hub: HubModel | None
    way: Way
    server: ActorHandle | None = None

    def to_json(self) -> dict[str, Any]:
        """All but the server, which is no text: Ray sends it along as an argument of its own."""
        hub = HUB.dump_python(self.hub, mode="json")
        return {"model": self.model.to_json(), "content": self.content, "hub": hub, "way": self.way}

    @classmethod
    def from_json(cls, said: Mapping[str, Any], server: ActorHandle | None = None) -> WeightAccess:
        """What :meth:`to_json` said, and the server beside it."""
        return cls(
            DenseModel.from_json(said["model"]), said["content"], HUB.validate_python(said["hub"]), said["way"], server
        )

    def open(self) -> DenseModel:
        """The model as this node best reads it, or as it was told to.

        Raises:
            InputError: the node can't read it that way.
        """
        checkpoint = replace(self.model.checkpoint, source=self._source())
        return replace(self.model, checkpoint=checkpoint)

    @contextmanager
    def whole_folder(self) -> Iterator[Path]:
        """A folder with the whole model, for the one task that needs it: the node's own, or a copy until the end."""
        if self._reads_folder():
            yield self.model.checkpoint.whole_folder()
            return
        if self.hub and self.way != "served":
            try:
                folder = self.hub.fetch_all()
            except InputError:
                if not self._may_be_served():
                    raise
            else:
                yield folder
                return
        with TemporaryDirectory(prefix="distprune-model-") as copy:
            copy_served_folder(self.server, Path(copy))
            yield Path(copy)

    def _source(self) -> TensorSource:
        if self._reads_folder():
            return TensorFiles()
        if self.hub and self.way != "served":
            disable_progress_bars()
            files = HubFiles(self.hub, self.model.checkpoint.tensors)
            return FirstThatWorks(files, Served(self.server)) if self._may_be_served() else files
        return Served(self.server)

    def _reads_folder(self) -> bool:
        """Whether this node is to read the folder.

        Raises:
            InputError: it should, for want of another way, and can't.
        """
        if self.content is None or self.way in ("served", "hub"):
            return False
        problem = self._find_problem()
        if problem and self.way == "auto" and (self.hub or self.server):
            return False
        if problem:
            raise InputError(
                f"{self.model.checkpoint.weight_files[0].parent} {problem}. Let every node see the driver's folder "
                "under that path, or leave --weights at auto, which serves nodes that don't."
            )
        return True

    def _find_problem(self) -> str | None:
        """What is wrong with the folder here; the same path may hold another model on another machine."""
        try:
            found = self.model.checkpoint.fingerprint()
        except Exception as error:  # the clients of object stores share no base class
            return f"can't be read ({' '.join(str(error).split())})"
        return None if found == self.content else "holds another model than it does on the driver's node"

    def _may_be_served(self) -> bool:
        return self.way == "auto" and self.server is not None


@contextmanager
def naming_node() -> Iterator[None]:
    """Bad input inside is said to be this node's."""
    try:
        yield
    except InputError as error:
        raise type(error)(f"node {platform.node()}: {error}") from None


# ---------------------------------------------------------------- the driver's side


@contextmanager
def weight_access(job: Job, workers: WorkerPlan) -> Iterator[WeightAccess]:
    """What workers are to be told of a run's model, and a server on the driver's node where some may need one."""
    way = job.config.weights
    bare = replace(job.model, checkpoint=replace(job.checkpoint, source=TensorFiles()))
    content = job.checkpoint.fingerprint() if job.hub is None or way == "shared" else None
    access = WeightAccess(bare, content, job.hub, way)
    if way in ("shared", "hub") or (way == "auto" and not may_span_nodes(workers)):
        yield access
        return
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    server = WeightServer.options(scheduling_strategy=here).remote(*in_pieces(replace(access, way="auto").to_json()))
    try:
        yield replace(access, server=server)
    finally:
        ray.kill(server)


def may_span_nodes(workers: WorkerPlan) -> bool:
    """Whether workers may be on other nodes than the driver's, now or when the cluster has grown."""
    nodes, asked = alive_nodes(), {"CPU": workers.cpus, "GPU": workers.gpus}
    return len(nodes) > 1 or workers.count > sum(count_fitting(asked, node) for node in nodes)


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class WeightServer:
    """Reads tensors on the driver's node for workers that can't. Keeps nothing that a restart would miss."""

    def __init__(self, *access: bytes):
        self._access = WeightAccess.from_json(whole_of(access))
        self._opened: Checkpoint | None = None
        self._found: Path | None = None

    @property
    def _checkpoint(self) -> Checkpoint:
        # Opened when first asked, so that a problem is an ordinary error of the worker that asks.
        if self._opened is None:
            with naming_node():
                self._opened = self._access.open().checkpoint
        return self._opened

    @property
    def _folder(self) -> Path:
        """The model's folder, fetched whole if it isn't here."""
        if self._found is None:
            with naming_node(), self._access.whole_folder() as self._found:
                pass
        return self._found

    def read(self, name: str) -> HostTensor:
        return pack(self._checkpoint.read([name])[name])

    def read_rows(self, name: str, rows: HostTensor) -> HostTensor:
        return pack(self._checkpoint.read_rows(name, unpack(rows)))

    def list_folder(self) -> dict[str, int]:
        """The names and sizes of the files in the model's folder."""
        return {file.name: file.stat().st_size for file in self._folder.iterdir() if file.is_file()}

    def read_file(self, name: str, begin: int) -> bytes:
        """The piece of a file that begins there."""
        with (self._folder / name).open("rb") as stream:
            stream.seek(begin)
            return stream.read(PIECE)


# ---------------------------------------------------------------- the sources of nodes that don't see the folder


class Served:
    """Asks the driver's node for tensors, which come through the object store, one object each."""

    def __init__(self, server: ActorHandle):
        self._server = server

    def read(self, infos: Mapping[str, TensorInfo]) -> dict[str, Tensor]:
        coming = {name: self._server.read.remote(name) for name in infos}
        # A copy of its own, so that a layer does not stay in the object store while it is worked on.
        return {name: unpack(fetch(coming.pop(name))).clone() for name in infos}

    def read_rows(self, name: str, info: TensorInfo, rows: Tensor) -> Tensor:
        return unpack(fetch(self._server.read_rows.remote(name, pack(rows)))).clone()


class FirstThatWorks:
    """Reads from one source until that fails, as the hub does without a network, and from another ever after."""

    def __init__(self, first: TensorSource, second: TensorSource):
        self._source, self._second = first, second

    def read(self, infos: Mapping[str, TensorInfo]) -> dict[str, Tensor]:
        try:
            return self._source.read(infos)
        except InputError:
            self._source = self._second
            return self._source.read(infos)

    def read_rows(self, name: str, info: TensorInfo, rows: Tensor) -> Tensor:
        try:
            return self._source.read_rows(name, info, rows)
        except InputError:
            self._source = self._second
            return self._source.read_rows(name, info, rows)


def copy_served_folder(server: ActorHandle, copy: Path) -> None:
    """Fill a folder with what the model's folder on the driver's node holds.

    Raises:
        InputError: there is no room for it.
    """
    sizes = fetch(server.list_folder.remote())
    check_free_space(copy, sum(sizes.values()))
    for name, size in sizes.items():
        with (copy / name).open("wb") as stream:
            for begin in range(0, size, PIECE):
                stream.write(fetch(server.read_file.remote(name, begin)))
