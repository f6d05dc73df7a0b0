"""How a grid is shared among machines: with a Ray made of lists, and once with Ray itself."""

import os
import socket
import subprocess
import sys
from collections import deque
from types import ModuleType, SimpleNamespace

import msgspec
import pytest

from selab.bench.machine import machine
from selab.errors import OutOfMemoryError, SelabError
from selab.experiments import cluster, sweep
from selab.experiments.job import resolve
from selab.experiments.profiling import count_job
from selab.records import store
from selab.records.types import Machine


class EndedError(Exception):
    """What a Ray error is to the driver."""


class RanOutError(EndedError):
    """Ray ended the worker for its memory."""


class FakeRay(ModuleType):
    """Nodes that work one call at a time; `faults` maps a node to what its first calls raise.

    `order` is what was measured: (node, batch). A node in `dies` is dead after its fault.
    """

    def __init__(self, machines, *, faults=None, dies=()):
        super().__init__("ray")
        self.machines, self.faults, self.dies = machines, {k: deque(v) for k, v in (faults or {}).items()}, set(dies)
        self.alive = dict.fromkeys(machines, True)
        self.order, self.options, self.shut = [], [], False
        self.worker = cluster.Worker()

    def init(self, **options):
        self.options.append(options)

    def shutdown(self):
        self.shut = True

    def nodes(self):
        return [
            {"NodeID": name, "Alive": self.alive[name], "NodeManagerAddress": name, "Resources": {"CPU": 4.0}}
            for name in self.machines
        ]

    def remote(self, _worker):
        def options(**chosen):
            self.options.append(chosen)
            node = chosen["scheduling_strategy"].node_id

            def told(_device):
                return lambda: msgspec.json.encode(self.machines[node])

            def measure(request):
                return lambda: self._measured(node, request)

            methods = {name: SimpleNamespace(remote=one) for name, one in (("machine", told), ("measure", measure))}
            return SimpleNamespace(remote=lambda: SimpleNamespace(**methods))

        return SimpleNamespace(options=options)

    def _measured(self, node, request):
        self.order.append((node, msgspec.json.decode(request)["request"]["batch"]))
        if self.faults.get(node):
            self.alive[node] = node not in self.dies
            raise self.faults[node].popleft()
        return self.worker.measure(request)

    def get(self, call, timeout=None):
        return call()

    def wait(self, calls, num_returns):
        return calls[:1], calls[1:]


def fake_measure(job, report):
    if job.request.batch == 64:
        raise OutOfMemoryError("out of memory: no room")
    record = count_job(job, counters=False)
    return msgspec.structs.replace(record, kind="profile", command=job.command())


@pytest.fixture
def use(monkeypatch):
    def install(fake):
        schedule, errors = ModuleType("ray.util.scheduling_strategies"), ModuleType("ray.exceptions")
        schedule.NodeAffinitySchedulingStrategy = lambda node_id, soft: SimpleNamespace(node_id=node_id, soft=soft)
        errors.RayError, errors.OutOfMemoryError = EndedError, RanOutError
        for one in (fake, schedule, errors):
            monkeypatch.setitem(sys.modules, one.__name__, one)
        monkeypatch.setattr(cluster, "measure", fake_measure)
        monkeypatch.setattr(cluster, "_check_listens", lambda *_: None)
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_USAGE_STATS_ENABLED", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"):
            # Set and taken back, so that what a local cluster sets does not outlive the test.
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        return fake

    return install


HERE = machine()
OTHER: Machine = msgspec.structs.replace(HERE, name="another", cpu="Another")


def grid(batches=(1, 2, 4)):
    cells = sweep.cells(["se_small_cnn"], [], batches, phases=("forward",), threads=1, quick=True)
    return [resolve(one) for one in cells]


def swept(out, *, batches=(1, 2, 4), address="there:6379"):
    return list(cluster.swept(grid(batches), out, lambda *_: None, address=address))


def test_equal_machines_share_the_grid_and_others_have_their_own(use, tmp_path):
    fake = use(FakeRay({"a": HERE, "b": HERE, "c": OTHER}))
    outcomes = swept(tmp_path)
    assert {one.state for one in outcomes} == {"measured"}
    assert sorted(batch for node, batch in fake.order if node in "ab") == [1, 2, 4]
    assert {node for node, _ in fake.order} == {"a", "b", "c"}
    assert [batch for node, batch in fake.order if node == "c"] == [1, 2, 4]
    assert {path.name: len(list(path.iterdir())) for path in tmp_path.iterdir()} == {HERE.name: 3, "another": 3}
    assert len(store.read_records(tmp_path / "another")) == 3
    assert fake.shut


def test_a_worker_holds_all_of_its_node(use, tmp_path):
    fake = use(FakeRay({"a": HERE}))
    swept(tmp_path)
    init, actor = fake.options
    assert init["address"] == "there:6379"
    assert (actor["num_cpus"], actor["num_gpus"]) == (4.0, 0)
    assert actor["scheduling_strategy"] == SimpleNamespace(node_id="a", soft=False)


def test_a_local_cluster_stays_on_this_machine(use, tmp_path):
    fake = use(FakeRay({"a": HERE}))
    swept(tmp_path, address="local")
    init = fake.options[0]
    assert (init["_node_ip_address"], init["include_dashboard"]) == ("127.0.0.1", False)
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64


def test_the_cell_of_a_machine_that_ends_goes_to_an_equal_one(use, tmp_path):
    fake = use(FakeRay({"a": HERE, "b": HERE}, faults={"b": [EndedError("gone")]}, dies="b"))
    outcomes = swept(tmp_path)
    assert [one.state for one in outcomes] == ["measured"] * 3
    assert [node for node, _ in fake.order].count("b") == 1


def test_without_an_equal_machine_the_rest_is_noted(use, tmp_path):
    use(FakeRay({"a": HERE, "c": OTHER}, faults={"a": [EndedError("gone")]}, dies="a"))
    outcomes = swept(tmp_path)
    assert [one.state for one in outcomes if one.machine == OTHER] == ["measured"] * 3
    lost = [one for one in outcomes if one.machine == HERE]
    assert [one.state for one in lost] == ["failed"] * 3
    assert lost[0].text == f"no machine {HERE.name} is left; add one and run again"


def test_a_cell_that_ends_its_workers_is_given_up_and_the_others_go_on(use, tmp_path):
    fake = use(FakeRay({"a": HERE}, faults={"a": [EndedError("gone")] * 3}))
    outcomes = swept(tmp_path)
    assert [one.state for one in outcomes] == ["failed", "measured", "measured"]
    assert "3 workers ended in it: gone" in outcomes[0].text
    assert [batch for _, batch in fake.order] == [1, 1, 1, 2, 4]


def test_memory_skips_what_is_larger(use, tmp_path):
    use(FakeRay({"a": HERE}))
    assert [one.state for one in swept(tmp_path, batches=(1, 64, 128))] == ["measured", "out of memory", "skipped"]
    use(FakeRay({"a": HERE}, faults={"a": [RanOutError("killed")]}))
    assert [one.state for one in swept(tmp_path / "b", batches=(1, 2))] == ["out of memory", "skipped"]


@pytest.mark.parametrize(
    ("change", "words"),
    [({"python": "2.7.1"}, "has Python 2.7"), ({"libraries": {"torch": "0.1"}}, "with torch 0.1")],
)
def test_another_python_or_torch_is_told_in_one_line(use, tmp_path, change, words):
    fake = use(FakeRay({"a": HERE, "b": msgspec.structs.replace(HERE, **change)}))
    with pytest.raises(SelabError, match=f"{words}.*; install the same on both"):
        swept(tmp_path)
    assert fake.shut


def test_machines_of_one_name_that_differ_are_refused(use, tmp_path):
    use(FakeRay({"a": HERE, "b": msgspec.structs.replace(HERE, cores=HERE.cores + 1)}))
    with pytest.raises(SelabError, match=f"two machines are called {HERE.name} and differ in cores"):
        swept(tmp_path)


def test_a_cluster_that_is_not_to_be_reached_is_told_in_one_line(use, tmp_path):
    fake = use(FakeRay({}))
    with pytest.raises(SelabError, match="no node has a processor to measure on"):
        swept(tmp_path)

    def refuse(**_options):
        raise ConnectionError("nobody answers\nand more")

    fake.init = refuse
    with pytest.raises(SelabError, match="--ray there:6379: cannot be reached: nobody answers; is it running"):
        swept(tmp_path)


def test_a_port_where_nobody_listens_is_told_at_once():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        # Bound, but nobody listens.
        with pytest.raises(SelabError, match=rf"--ray {address}: cannot be reached: .*refused; is it running"):
            cluster._check_listens(address, "is it running")
        taken.listen()
        cluster._check_listens(address, "is it running")
    for other in ("local", "auto", "ray://there:10001"):
        cluster._check_listens(other, "is it running")


def test_without_ray_one_line_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SelabError, match=r"pip install 'selab\[ray\]'"):
        swept(tmp_path)


@pytest.mark.slow
def test_a_cell_on_a_local_cluster(tmp_path, root):
    pytest.importorskip("ray", reason="Ray is not installed")
    home = tmp_path / "home"
    home.mkdir()
    words = ["sweep", "--arch", "se_small_cnn", "--budget", "0.1", "--out", tmp_path / "r", "--ray", "local"]
    # Ray's own processes find the checkout too.
    environment = {**os.environ, "HOME": str(home), "PYTHONPATH": str(root)}
    with (tmp_path / "said").open("w+") as said:
        # A file, for Ray's processes would keep a pipe open.
        command = [sys.executable, "-m", "selab", *map(str, words)]
        done = subprocess.run(command, stdout=said, stderr=said, timeout=180, check=False, env=environment)
        said.seek(0)
        assert done.returncode == 0, said.read()
    (record,) = store.read_records(tmp_path / "r" / HERE.name)
    assert record.complete
    assert not (home / ".ray").exists()
