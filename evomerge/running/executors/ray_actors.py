"""Workers as actors of a Ray cluster: the same `Worker`, on any of its nodes.

Ray finds each actor a place that has what it needs (CPUs, a GPU, resources of one's own) and shows it only
the GPUs it got. Files of models and tasks are read where the actor is: they must lie at the same paths on
every node, and workers of one node share their memory, because they map them. Nothing large passes through
Ray.

A Ray of our own listens on this machine's loopback interface only. The cluster is looked after while actors
work: Ray itself would wait for a lost one for minutes, then end this process.

An actor that is lost, alone or with its node, is an ordinary death of a worker (see `Pool`): its candidate is
given to another. Actors are never restarted by Ray itself, so that a candidate is counted out in one place.
Nodes should be of one kind: processors of different kinds give scores that differ in their last bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import math
import os
import socket
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tenacity

from evomerge.errors import ClusterError, ConfigError, ModelError, UserError
from evomerge.evaluation.sharing import Sharing
from evomerge.running.executors.contract import AnyJob, BuildWorker
from evomerge.running.executors.devices import cores
from evomerge.running.executors.pool import Died, Message, Pool
from evomerge.running.worker import Result, Worker, WorkerSpec
from evomerge.version import __version__

OBJECT_STORE_BYTES = 100 * 2**20
"""Of a Ray of our own: only recipes and scores pass through it."""
ANSWER_SECONDS = 5.0
"""Seconds an idle actor may take to answer."""
GONE_SECONDS = 10.0
"""Seconds a killed actor may take to end."""
LOST_SECONDS = 15.0
"""Seconds without an answer of the cluster after which it is lost. After 60, Ray ends this process."""
PULSE_SECONDS = 2.0
"""Seconds between two looks at the cluster."""
MEMORY = ("running low on memory", "OutOfMemoryError")
"""What Ray says of the death of an actor that it killed for its node's memory."""
LOOPBACK = "127.0.0.1"
NO_CLUSTER = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""The variable with which Ray keeps a local node on the loopback interface, on any system."""
HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""The first words of HTTP/2, which Ray's servers speak: they answer with a frame of the same type, 4."""
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # what Ray will do by default, and else warns about
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # it prints deaths of actors on stdout, which may be read as JSON
}


class Actor:
    """Lives in a process of Ray's and holds a worker."""

    def begin(self, build_worker: BuildWorker, spec: WorkerSpec, name: str, version: str) -> Message:
        """Build the worker; return what it decided or True, or why it can't be used."""
        node = socket.gethostname()
        if version != __version__:
            return UserError(
                f"node {node} of the Ray cluster has another evomerge",
                expected=version,
                got=__version__,
                fix="install the same version on every node",
            )
        try:
            _check_paths(spec, node)
            self._worker = build_worker(spec, name)
        except UserError as error:
            return error
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return self._worker.sharing or True

    def run(self, job: AnyJob) -> Result | UserError:
        """Do a job; return an error where no worker could do it now."""
        try:
            return self._worker.run(job)
        except UserError as error:
            return error

    def process(self) -> int:
        """Return the process's number, as a sign of life."""
        return os.getpid()


@dataclass(slots=True, kw_only=True, eq=False)
class ActorHandle:
    """An actor and its pending answer."""

    actor: Any
    answer: Any
    job: AnyJob | None = None


class Actors:
    """Actors as workers."""

    lingers = True

    def __init__(self, ray: Any, spec: WorkerSpec, worker: BuildWorker, needs: Mapping[str, float]) -> None:
        self._pulse = Pulse(ray)
        self._ray, self._spec, self._worker = ray, spec, worker
        special = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
        options: dict[str, Any] = {special[n]: v for n, v in needs.items() if n in special}
        own = {name: value for name, value in needs.items() if name not in special}
        self._actor = ray.remote(Actor).options(max_restarts=0, resources=own, **options)
        self.lack = f"look at the cluster with: ray status; every worker needs {_listed(needs)}"

    def start(self, name: str, seat: int) -> ActorHandle:
        """Ask for an actor, which Ray starts where there is room; it then builds its worker."""
        actor = self._actor.remote()
        return ActorHandle(
            actor=actor, answer=actor.begin.remote(self._worker, self._spec, name, __version__)
        )

    def share(self, sharing: Sharing) -> None:
        """Tell the actors still to come what the first decided."""
        self._spec = dataclasses.replace(self._spec, sharing=sharing)

    def give(self, worker: ActorHandle, job: AnyJob) -> None:
        """Send a job."""
        worker.job, worker.answer = job, worker.actor.run.remote(job)

    def wait(self, workers: Sequence[ActorHandle], seconds: float) -> list[tuple[ActorHandle, Message]]:
        """Collect what actors answered; an error in place of an answer is a death."""
        answers = {worker.answer: worker for worker in workers}
        deadline = self.now() + seconds
        ready: list[Any] = []
        while not ready:
            self._pulse.check()
            left = deadline - self.now()
            ready, rest = self._ray.wait(
                list(answers), num_returns=1, timeout=max(0.0, min(left, PULSE_SECONDS))
            )
            if left <= 0:
                break
        if ready and rest:
            ready += self._ray.wait(rest, num_returns=len(rest), timeout=0)[0]
        heard = ((answers[answer], self._received(answers[answer])) for answer in ready)
        return [(worker, message) for worker, message in heard if message is not None]

    def alive(self, worker: ActorHandle) -> bool:
        """Say whether an actor answers; one that can't be reached for a moment is asked again."""
        exceptions = self._ray.exceptions
        asked = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type((exceptions.ActorUnavailableError, ConnectionError)),
            wait=tenacity.wait_exponential(multiplier=0.1, max=2.0),
            stop=tenacity.stop_after_delay(ANSWER_SECONDS),
            reraise=True,
        )
        try:
            asked(lambda: self._ray.get(worker.actor.process.remote(), timeout=ANSWER_SECONDS))
        except (exceptions.RayError, ConnectionError):
            return False
        return True

    def kill(self, worker: ActorHandle) -> None:
        """Kill an actor, or cancel its creation."""
        self._ray.kill(worker.actor, no_restart=True)

    def close(self, idle: Sequence[ActorHandle], busy: Sequence[ActorHandle]) -> None:
        """Kill all actors and wait for them to be gone."""
        if not self._ray.is_initialized() or self._pulse.lost:  # the cluster went first
            return
        for worker in (*idle, *busy):
            self.kill(worker)
        deadline = self.now() + GONE_SECONDS
        for worker in (*idle, *busy):
            while self.now() < deadline and self._there(worker):
                time.sleep(0.05)

    def now(self) -> float:
        """Return the machine's monotonic clock."""
        return time.monotonic()

    def _received(self, worker: ActorHandle) -> Message | None:
        exceptions = self._ray.exceptions
        try:
            return self._ray.get(worker.answer)  # type: ignore[no-any-return]
        except exceptions.ActorUnavailableError:
            if worker.job is not None and self.alive(worker):
                self.give(worker, worker.job)  # whether or not it was done: the scores are the same
                return None
            return Died(reason="its Ray actor can't be reached")
        except exceptions.RayError as error:
            return _died(error)

    def _there(self, worker: ActorHandle) -> bool:
        try:
            self._ray.get(worker.actor.process.remote(), timeout=1.0)
        except self._ray.exceptions.RayActorError:
            return False
        except self._ray.exceptions.GetTimeoutError:
            return True  # it still works on something
        return True


def _died(error: Exception) -> Died:
    """Return the death of an actor; Ray kills what takes too much of a node's memory, and says so."""
    if type(error).__name__ == "OutOfMemoryError" or any(words in str(error) for words in MEMORY):
        return Died(reason="Ray killed its actor: the node ran low on memory", kind="out_of_memory")
    return Died(reason="its Ray actor died")


class Pulse:
    """Whether the cluster lives: its head (GCS) and this machine's node (raylet)."""

    def __init__(self, ray: Any) -> None:
        context = ray.get_runtime_context() if ray.is_initialized() else None
        self._head = None if context is None else str(context.gcs_address)
        node = getattr(ray, "_private", None) and ray._private.worker.global_worker.node
        self._node = None if node is None else str(node.raylet_socket_name)
        self._last = self._well = time.monotonic()
        self.lost = False

    def check(self) -> None:
        """Look at the cluster now and then; raise ClusterError when it has not answered for a while."""
        now = time.monotonic()
        if self._head is None or now - self._last < PULSE_SECONDS:
            return
        self._last = now
        try:
            _greet(self._head)
            if self._node is not None:
                with socket.socket(socket.AF_UNIX) as door:
                    door.settimeout(ANSWER_SECONDS)
                    door.connect(self._node)
        except OSError as error:
            if now - self._well < LOST_SECONDS:
                return
            self.lost = True
            raise ClusterError(
                "the Ray cluster was lost while candidates were scored",
                got=f"no answer of its head or of this machine's node ({error.strerror or error})",
                fix="start the cluster again (a local one starts by itself)",
            ) from None
        self._well = now


def _greet(address: str) -> None:
    """Raise OSError where no server of Ray's listens at HOST:PORT."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS) as door:
        if os.environ.get("RAY_USE_TLS", "0") == "0":
            door.sendall(HELLO)
            if door.recv(4)[3:] != bytes([4]):
                raise OSError(errno.EPROTO, "something else than Ray answers")


class RayActors(Pool[ActorHandle]):
    """Runs jobs in `workers` actors of a Ray cluster; see `Pool` for what happens to those that fail.

    address: auto (the cluster this process or machine belongs to), local (a Ray of our own, which ends with
        us) or HOST:PORT. needs: what each worker takes of a node, by resource. workers: by default as many
        as there is room for. anywhere: the device was not chosen, so workers without a GPU are refused
        where the cluster has some.

    Raises UserError where Ray is missing or the cluster is not there or has no node that will do.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        *,
        address: str,
        needs: Mapping[str, float],
        workers: int | None,
        timeout: float,
        anywhere: bool = False,
        worker: BuildWorker = Worker,
    ) -> None:
        ray = _imported()
        self._ours = _connect(ray, address, math.ceil(needs["CPU"] * (workers or 1)))
        try:
            room = _room(ray, needs, anywhere)
            super().__init__(Actors(ray, spec, worker, needs), workers=workers or room, timeout=timeout)
        except BaseException:
            self._disconnect()
            raise

    def close(self) -> None:
        """Stop all workers; end Ray if it was started here."""
        super().close()
        self._disconnect()

    def _disconnect(self) -> None:
        if self._ours:
            self._ours = False
            _imported().shutdown()


def _imported() -> Any:
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        with _quiet():
            import ray
            import ray.exceptions
    except ImportError:
        raise UserError(
            "executor.name: ray is not installed",
            fix="pip install 'evomerge[ray]', on every node; or set executor.name: local",
        ) from None
    return ray


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence Ray's own warnings: none of them concerns the user's config."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _connect(ray: Any, address: str, cpus: int) -> bool:
    """Join a cluster or start a local one; return whether to shut it down at the end."""
    if ray.is_initialized():
        return False
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address == "local":
        options |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
        options |= {"num_cpus": max(cores(), cpus)}  # the user said how many workers share the cores
    try:
        if address == "local":
            with _quiet(), _on_loopback(ray):
                ray.init(address=address, _node_ip_address=LOOPBACK, **options)
            return True
        if "//" in address:
            raise ValueError("Ray's client addresses are not supported")
        _greet(_found(ray, address))  # Ray itself would go on trying for minutes
        with _quiet():
            ray.init(address=address, **options)
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise _no_cluster(address, error) from None
    return True


def _found(ray: Any, address: str) -> str:
    """Return an address as HOST:PORT; raise OSError or ValueError where it is none."""
    if address == "auto":
        return str(ray._private.services.canonicalize_bootstrap_address_or_die(address))
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"not HOST:PORT: {address}")
    return address


@contextlib.contextmanager
def _on_loopback(ray: Any) -> Iterator[None]:
    """Keep Ray's servers on the loopback interface: it reads this variable here and in its processes."""
    constants = ray._private.ray_constants
    before, told = constants.ENABLE_RAY_CLUSTER, os.environ.get(NO_CLUSTER)
    constants.ENABLE_RAY_CLUSTER = False
    os.environ[NO_CLUSTER] = "0"
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before
        if told is None:
            del os.environ[NO_CLUSTER]
        else:
            os.environ[NO_CLUSTER] = told


def _no_cluster(address: str, error: Exception) -> ClusterError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if address == "local":
        return ClusterError(
            "executor.address: a local Ray could not be started",
            got=lines[0] if lines else type(error).__name__,
            fix="look into /tmp/ray/session_latest/logs; or set executor.name: local",
        )
    if lines and "version mismatch" in lines[0].lower():
        return ClusterError(
            f"executor.address: the Ray cluster at {address!r} has another version of Ray or Python",
            got="; ".join(lines[1:5]) or lines[0],
            fix="install the same versions on every node and here",
        )
    return ClusterError(
        f"executor.address: no Ray cluster at {address!r}",
        expected="auto (on a machine of a cluster), local, or HOST:PORT",
        got=lines[0] if lines else type(error).__name__,
        fix="start one with: ray start --head; or set address: local",
    )


def _room(ray: Any, needs: Mapping[str, float], anywhere: bool) -> int:
    """Return how many workers the cluster has room for; raise ConfigError for none."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if anywhere and "GPU" not in needs and any(node.get("GPU") for node in nodes):
        raise ConfigError(
            "executor.device: the cluster has GPUs, and this machine has none",
            expected="device: cuda, or device: cpu",
            fix="say which; resources: {GPU: 0.5} lets two workers share one",
        )
    room = sum(min(int(node.get(name, 0) / need) for name, need in needs.items()) for node in nodes)
    if not room:
        raise ConfigError(
            "executor.resources: no node of the Ray cluster has room for a worker",
            expected=f"a node with {_listed(needs)}",
            got="; ".join(_listed(node) for node in nodes),
            fix="ask for less per worker, or start a node that has it",
        )
    return room


def _listed(resources: Mapping[str, float]) -> str:
    shown = {n: v for n, v in resources.items() if not n.startswith(("node:", "object_store"))}
    return ", ".join(f"{name} {value:g}" for name, value in sorted(shown.items()))


def _check_paths(spec: WorkerSpec, node: str) -> None:
    """Raise ModelError for models and tasks that lie on the driver's machine, but not here."""
    places = [part for location in spec.models.values() for part in location.split("+")]
    places += [str(spec.suite.tasks_dir)] if spec.suite.tasks_dir else []
    places += [str(path) for path in (spec.suite.data_files | spec.suite.scorer_files).values()]
    missing = [place for place in places if Path(place).is_absolute() and not Path(place).exists()]
    if missing:
        raise ModelError(
            f"node {node} of the Ray cluster lacks {missing[0]}",
            expected="all models and tasks at the same paths on every node",
            got=f"{len(missing)} of {len(places)} missing there",
            fix="share the folder between the nodes, or copy it to the same place on each",
        )
