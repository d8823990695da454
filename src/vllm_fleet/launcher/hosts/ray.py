"""Processes on the nodes of a Ray cluster. This side of it: the supervisor, which is the cluster's driver.

Each process has an actor on its node (hosts.ray_actor) that holds the resources, and a thread here that fetches its log
and learns of its end. Ray's actors die with their driver, and the processes with their actors.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import ConfigError, FleetError, PeerGone
from vllm_fleet.launcher.hosts import placement, ray_actor
from vllm_fleet.launcher.hosts.keeper import Order
from vllm_fleet.launcher.hosts.placement import Ask, Node
from vllm_fleet.launcher.hosts.ray_process import RayProcess, first_line
from vllm_fleet.launcher.spec import ProcessSpec
from vllm_fleet.net import sockets

NAMESPACE = "vllm-fleet"
DIAL_S = 5.0
CONNECT_S = 90.0  # a head that has just been started, on a machine with much else to do, takes a minute
CLIENT_TRIES = 2  # a client server starts a Python for each client, and Ray gives that 30 s
LOOK_S = 20.0
TOKEN_NAME = "token"
AUTO = "auto"


def check_installed() -> None:
    """ConfigError when Ray cannot be imported."""
    try:
        import ray  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"cluster.address needs Ray, which cannot be imported ({error}); run: pip install 'vllm-fleet[ray]'"
        ) from error


@dataclass(frozen=True)
class Cluster:
    """A connection to a running Ray cluster; this process has one at most."""

    address: str

    def nodes(self) -> list[Node]:
        """The living nodes, now.

        Raises:
            PeerGone: the cluster does not answer.
        """
        return [Node(row.id, row.address, row.total, row.free) for row in self.rows() if row.alive]

    def rows(self) -> list[ray_actor.NodeRow]:
        """All nodes, dead ones too; PeerGone when the cluster does not answer."""
        import ray

        try:
            ray_actor.check_connected()
            looked = ray.remote(ray_actor.nodes).options(num_cpus=0, max_retries=1).remote()
            return ray_actor.decode_nodes(ray.get(looked, timeout=LOOK_S))
        except (ray.exceptions.RayError, ConnectionError) as error:
            raise PeerGone(f"the Ray cluster at {self.address} does not answer: {first_line(error)}") from error

    def close(self) -> None:
        """Leave it. Actors that this process has made die."""
        import ray

        ray.shutdown()


def connect(address: str) -> Cluster:
    """Become a driver of a running cluster: ``auto``, ``HOST:PORT`` (of its GCS; this machine is one of its nodes) or
    ``ray://HOST:PORT`` (of its client server).

    Raises:
        ConfigError: Ray is not installed, or no cluster answers there.
    """
    check_installed()
    import ray

    if address != AUTO:  # Ray itself waits for minutes for an address where nobody listens
        parts = urlsplit(address if "://" in address else f"ray://{address}")
        try:
            sockets.dial(parts.hostname or "", parts.port or 0, Deadline.after(DIAL_S, "cluster.address")).close()
        except PeerGone as error:
            raise ConfigError(f"cluster.address: no Ray cluster answers at {address}: {error}") from error
    logging.getLogger("ray").setLevel(logging.ERROR)  # it would say that a thread has no signal handlers
    failures: list[BaseException] = []

    def init() -> None:
        tries = CLIENT_TRIES if address.startswith("ray://") else 1
        for left in reversed(range(tries)):
            try:
                ray.init(address, namespace=NAMESPACE, log_to_driver=False, configure_logging=False)
                return
            except (ConnectionError, RuntimeError, ValueError, OSError) as error:
                if not left:
                    failures.append(error)

    thread = threading.Thread(target=init, name="fleet-ray", daemon=True)
    thread.start()
    thread.join(CONNECT_S)
    if thread.is_alive():
        raise ConfigError(
            f"cluster.address: Ray did not connect to {address} within {CONNECT_S:g} s; does every node answer, and is "
            "this Ray's token theirs (RAY_AUTH_MODE, RAY_AUTH_TOKEN_PATH)?"
        )
    if failures:
        raise ConfigError(f"cluster.address: cannot connect to {address}: {first_line(failures[0])}") from failures[0]
    return Cluster(address)


class RayLauncher:
    """Starts processes on the nodes of a cluster."""

    def __init__(self, cluster: Cluster, token_file: Path, folders: Sequence[str] = ()) -> None:
        """``token_file``: what it holds is given to each process as ``{fleet.folder}/token``. ``folders`` must be on
        every node that is used."""
        self.cluster, self.token_file, self._folders = cluster, token_file, tuple(folders)
        self._started: list[RayProcess] = []
        self._lock = threading.Lock()
        """Guards what follows: one process is placed at a time, each by a thread of its own."""
        self._held: dict[RayProcess, tuple[ProcessSpec, Node]] = {}
        self._planned: dict[str, str] = {}

    def plan(self, asks: Sequence[Ask]) -> dict[str, str]:
        """Where processes will be started for the first time: name -> address of a node.

        Raises:
            Busy: the cluster has no room for them all.
            PeerGone: it does not answer.
        """
        nodes = {node.id: node for node in self.cluster.nodes()}
        self._planned = placement.place(asks, list(nodes.values()))
        return {name: nodes[id_].address for name, id_ in self._planned.items()}

    def start(self, spec: ProcessSpec, log_file: Path) -> RayProcess:
        """Have it placed and started, behind our back; FleetError when its log or the token cannot be opened."""
        try:
            log_file.open("ab").close()
            token = self.token_file.read_text()
        except OSError as error:
            raise FleetError(f"cannot start {spec.name}: {error}") from error
        files = {TOKEN_NAME: token}
        order = Order(spec.name, spec.argv, dict(spec.env), "", spec.sides, files, self._folders)
        process = RayProcess(self, self.cluster, spec, log_file, order)
        self._started = [*(each for each in self._started if not each.poll()), process]
        return process

    def place(self, process: RayProcess, spec: ProcessSpec) -> Node:
        """A node with room, held until ``release``; Busy when there is none, PeerGone when the cluster is silent."""
        with self._lock:
            nodes = {node.id: node for node in map(self._without_ours, self.cluster.nodes())}
            wanted = nodes.get(self._planned.pop(spec.name, ""))
            ask = Ask(spec.name, spec.role, spec.needs or {})
            if wanted is None or not placement.fits(ask.needs, wanted.free):
                held = [(other.role, node.id) for other, node in self._held.values()]
                wanted = nodes[placement.place([ask], list(nodes.values()), held)[spec.name]]
            self._held[process] = (spec, wanted)
            return wanted

    def release(self, process: RayProcess) -> None:
        """It holds nothing any more."""
        with self._lock:
            self._held.pop(process, None)

    def _without_ours(self, node: Node) -> Node:
        """Less what we hold there: Ray's own view of what is free is late by some tenths of a second."""
        free = dict(node.free)
        for kind, total in node.total.items():
            ours = sum((spec.needs or {}).get(kind, 0.0) for spec, other in self._held.values() if other.id == node.id)
            free[kind] = min(free.get(kind, 0.0), total - ours)
        return replace(node, free=free)

    def close(self) -> None:
        """Leave the cluster; what still runs on it is killed."""
        for process in self._started:
            process.drop()
        self.cluster.close()
