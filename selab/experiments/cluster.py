"""Run a sweep on a Ray cluster, one paired measurement at a time on each machine. Ray is imported only here."""

import importlib
import os
import secrets
import socket
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from selab import units
from selab.bench.machine import available_cores
from selab.bench.machine import machine as this_machine
from selab.bench.progress import Report
from selab.errors import OutOfMemoryError, SelabError
from selab.experiments.job import Job
from selab.experiments.sweep import Outcome, ResultCache, cell_words, measure
from selab.meta import first_line
from selab.records.types import Device, Frozen, Machine, from_json, to_json

LOCAL = "local"
# Seconds for the head to answer a connection.
_PATIENCE_S = 5.0
# A cell that has ended so many workers is likely to be the cause.
_MOST_ENDED = 3
# Seconds in which a worker must have started; torch alone takes some on a cold disk.
_STARTING_S = 300.0


class Answer(Frozen, frozen=True, kw_only=True):
    """The answer of a worker for a cell: a record as JSON, or why there is none."""

    record: bytes = b""
    error: str = ""
    of_memory: bool = False


class Worker:
    """A Ray actor on a node, which measures one cell after the other."""

    def machine(self, device: Device) -> bytes:
        """Return the node as JSON of a `Machine`."""
        return msgspec.json.encode(this_machine(device))

    def measure(self, job: bytes) -> bytes:
        """Measure a cell: the JSON of a `Job` → that of an `Answer`."""
        asked = msgspec.json.decode(job, type=Job)
        try:
            answer = Answer(record=to_json(measure(asked, lambda _label, _state: None)))
        except SelabError as error:
            answer = Answer(error=str(error), of_memory=isinstance(error, OutOfMemoryError))
        return msgspec.json.encode(answer)


def swept(asked: Sequence[Job], out: Path, report: Report, *, address: str, retry: bool = False) -> Iterator[Outcome]:
    """Measure the whole grid on every kind of machine in the cluster, shared among equal machines.

    Args:
        asked: of `sweep.resolve_cells`.
        out: the driver writes every record to OUT/<machine>/.
        report: called with the progress.
        address: of the cluster as `ray.init` takes it, or `local` for one on this machine alone.
        retry: as for `sweep.sweep`.

    Raises:
        SelabError: Ray is not installed, the cluster cannot be reached, no node can measure, or a node has another
            Python or torch.
        RecordError: a record cannot be written.
    """
    with _connected(address, asked[0].workload.device) as ray:
        report("waiting for the machines", None)
        cluster = _Cluster(ray, address, asked[0].workload.device)
        kinds = _kinds(cluster.seats(), out, retry=retry)
        for kind in kinds:
            kind.waiting.extend((job, 0) for job in asked)
        yield from _shared(cluster, kinds, report)


# ------------------------------------------------------------------------------------------------------------- cluster
def _check_listens(address: str, hint: str) -> None:
    """Fail at once where nobody listens; Ray itself would try for ten minutes."""
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        return
    try:
        with socket.create_connection((host, int(port)), timeout=_PATIENCE_S):
            pass
    except OSError as error:
        raise SelabError(f"--ray {address}: cannot be reached: {error.strerror or error}; {hint}") from None


@contextmanager
def _connected(address: str, device: Device) -> Iterator[Any]:
    if address == LOCAL:
        _keep_to_this_machine(os.environ)
    try:
        ray = importlib.import_module("ray")
    except ImportError:
        raise SelabError("--ray: Ray is not installed; pip install 'selab[ray]'") from None
    options: dict[str, Any] = {
        **_job_options(ray),
        "address": address,
        "log_to_driver": False,
        "logging_level": "ERROR",
    }
    if address == LOCAL:
        gpus = {"num_gpus": 1} if device == "cuda" else {}
        options |= {"num_cpus": available_cores(), "include_dashboard": False, **gpus}
        options["_node_ip_address"] = "127.0.0.1"
    hint = "is it running (`ray start --head`), with this Python and this Ray?"
    _check_listens(address, hint)
    try:
        ray.init(**options)
    except Exception as error:
        raise SelabError(f"--ray {address}: cannot be reached: {first_line(error)}; {hint}") from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _job_options(ray: Any) -> dict[str, Any]:
    """Return options for workers that do not import from the driver's folder; Ray would put it first on their path."""
    module = getattr(ray, "job_config", None)
    if module is None:
        return {}

    class ConfigWithoutFolder(module.JobConfig):  # type: ignore[misc, name-defined]
        def _runtime_env_has_working_dir(self) -> bool:
            # Ray adds the folder unless the job says that it sends one.
            return True

    return {"job_config": ConfigWithoutFolder()}


def _keep_to_this_machine(environment: Any) -> None:
    """Make a local Ray listen on the loopback address alone, ask for a token, and report nothing.

    The token is in the environment of Ray's own processes; Ray would otherwise write one into the home folder.
    """
    environment.setdefault("RAY_AUTH_MODE", "token")
    if environment["RAY_AUTH_MODE"] == "token" and "RAY_AUTH_TOKEN_PATH" not in environment:
        environment.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    environment["RAY_USAGE_STATS_ENABLED"] = "0"
    # Linux's Ray turns 127.0.0.1 into the address of the network, unless it believes that there is no cluster.
    environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"


@dataclass(frozen=True, kw_only=True)
class _Seat:
    """A node that is alive and the worker on it; the node as `ray.nodes` describes it."""

    node: dict[str, Any]
    worker: Any


class _Cluster:
    """The nodes that can measure, with a worker on each that reserves all of its processors."""

    def __init__(self, ray: Any, address: str, device: Device) -> None:
        self.ray, self.address, self.device = ray, address, device

    def nodes(self) -> list[dict[str, Any]]:
        """Return the nodes that are alive and have the device."""
        needed = "GPU" if self.device == "cuda" else "CPU"
        return [node for node in self.ray.nodes() if node["Alive"] and node["Resources"].get(needed, 0) >= 1]

    def seat(self, node: dict[str, Any]) -> _Seat:
        """Start a new worker on a node."""
        affinity = importlib.import_module("ray.util.scheduling_strategies").NodeAffinitySchedulingStrategy
        options = {
            "num_cpus": node["Resources"].get("CPU", 0),
            "num_gpus": 1 if self.device == "cuda" else 0,
            "scheduling_strategy": affinity(node["NodeID"], soft=False),
        }
        return _Seat(node=node, worker=self.ray.remote(Worker).options(**options).remote())

    def again(self, lost: _Seat) -> list[_Seat]:
        """Start a new worker where one has ended; none if its node has ended too."""
        return [self.seat(node) for node in self.nodes() if node["NodeID"] == lost.node["NodeID"]]

    def seats(self) -> list[tuple[_Seat, Machine]]:
        """Return every node's worker and its machine.

        Raises:
            SelabError: there is none, one does not start, or one has another Python or torch.
        """
        nodes = self.nodes()
        if not nodes:
            what = "GPU" if self.device == "cuda" else "processor"
            raise SelabError(f"--ray {self.address}: no node has a {what} to measure on; add one with `ray start`")
        return [(seat, self._machine(seat)) for seat in [self.seat(node) for node in nodes]]

    def _machine(self, seat: _Seat) -> Machine:
        place = f"--ray {self.address}: node {seat.node['NodeManagerAddress']}"
        try:
            answer = self.ray.get(seat.worker.machine.remote(self.device), timeout=_STARTING_S)
        except Exception as error:
            hint = "install the same selab there, and free its processors"
            raise SelabError(f"{place}: starts no worker: {first_line(error)}; {hint}") from None
        there = msgspec.json.decode(answer, type=Machine)
        ours, theirs = _versions(this_machine()), _versions(there)
        if ours != theirs:
            raise SelabError(f"{place}: has {theirs}, here it is {ours}; install the same on both")
        return there


@dataclass(kw_only=True)
class _Kind:
    """Equal machines, which share the grid.

    Attributes:
        waiting: cells, each with the number of workers that it has ended.
    """

    cache: ResultCache
    idle: list[_Seat] = field(default_factory=list)
    waiting: deque[tuple[Job, int]] = field(default_factory=deque)


def _versions(machine: Machine) -> str:
    return f"Python {'.'.join(machine.python.split('.')[:2])} with torch {machine.libraries.get('torch', '')}"


def _kinds(seats: Sequence[tuple[_Seat, Machine]], out: Path, *, retry: bool) -> list[_Kind]:
    """Group equal machines.

    Raises:
        SelabError: two that differ have the same name, so that their records would share a folder.
    """
    found: dict[bytes, _Kind] = {}
    named: dict[str, bytes] = {}
    for seat, there in seats:
        key = msgspec.json.encode((there.name, there.cpu, there.cores, there.gpu, sorted(there.libraries.items())))
        if named.setdefault(there.name, key) != key:
            other = found[named[there.name]].cache.machine
            differing = ", ".join(_differing(there, other))
            raise SelabError(f"--ray: two machines are called {there.name} and differ in {differing}; make them equal")
        found.setdefault(key, _Kind(cache=ResultCache(out, there, retry=retry))).idle.append(seat)
    return list(found.values())


def _differing(one: Machine, other: Machine) -> list[str]:
    libraries: Mapping[str, str] = {**one.libraries, **other.libraries}
    names = [name for name in libraries if one.libraries.get(name) != other.libraries.get(name)]
    return [name for name in ("cpu", "cores", "gpu") if getattr(one, name) != getattr(other, name)] + names


# --------------------------------------------------------------------------------------------------------------- cells
@dataclass(frozen=True, kw_only=True)
class _Running:
    """A cell that is being measured, and the number of workers that it has ended."""

    kind: _Kind
    seat: _Seat
    job: Job
    ended: int


def _shared(cluster: _Cluster, kinds: Sequence[_Kind], report: Report) -> Iterator[Outcome]:
    """Give cells to idle workers and take their answers, until no cell waits."""
    running: dict[Any, _Running] = {}
    while True:
        for kind in kinds:
            yield from _handed_out(kind, running)
        if not running:
            return
        waiting = sum(len(kind.waiting) for kind in kinds)
        report(f"{len(running)} measured now, {waiting} waiting", None)
        (done,), _ = cluster.ray.wait(list(running), num_returns=1)
        yield from _taken(cluster, done, running.pop(done))


def _handed_out(kind: _Kind, running: dict[Any, _Running]) -> Iterator[Outcome]:
    """Give each idle worker a cell; yield cells that need no measurement, or for which no machine is left."""
    while kind.waiting and (kind.idle or not any(one.kind is kind for one in running.values())):
        job, ended = kind.waiting.popleft()
        try:
            known = kind.cache.known(job)
            wanted = kind.cache.wanted(job) if known is None else job
        except SelabError as error:
            known = kind.cache.failed(job, str(error))
        if known is not None:
            yield known
        elif not kind.idle:
            yield kind.cache.failed(job, f"no machine {kind.cache.machine.name} is left; add one and run again")
        else:
            seat = kind.idle.pop()
            done = seat.worker.measure.remote(msgspec.json.encode(wanted))
            running[done] = _Running(kind=kind, seat=seat, job=job, ended=ended)


def _taken(cluster: _Cluster, done: Any, one: _Running) -> Iterator[Outcome]:
    """Yield the outcome of a cell; nothing where its worker ended and another worker shall try."""
    errors = importlib.import_module("ray.exceptions")
    cache, where = one.kind.cache, cell_words(one.job)
    try:
        answer = msgspec.json.decode(cluster.ray.get(done), type=Answer)
    except errors.RayError as error:
        # In front, so that another machine is asked first; a node's end is known only after a while.
        one.kind.idle[:0] = cluster.again(one.seat)
        if isinstance(error, errors.OutOfMemoryError):
            yield cache.failed(one.job, "out of memory: Ray ended the worker", of_memory=True)
        elif one.ended + 1 < _MOST_ENDED:
            one.kind.waiting.appendleft((one.job, one.ended + 1))
        else:
            yield cache.failed(
                one.job, f"{where}: {units.counted(_MOST_ENDED, 'worker')} ended in it: {first_line(error)}"
            )
        return
    one.kind.idle.append(one.seat)
    try:
        if answer.error:
            yield cache.failed(one.job, answer.error, of_memory=answer.of_memory)
        else:
            yield cache.measured(one.job, from_json(answer.record, where=where))
    except SelabError as error:
        yield cache.failed(one.job, str(error))
