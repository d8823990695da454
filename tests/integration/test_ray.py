"""A fleet on a Ray cluster of two hosts: a head here and a worker in a network namespace, with real vLLM."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import COMMAND, MODEL
from tests.contract import network
from tests.contract.network import SecondHost, second_host
from tests.contract.ray_cluster import RayCluster, RayNode
from tests.integration.asking import ask_all, body
from vllm_fleet.bench.plain import scrape, total
from vllm_fleet.bench.recall import make_prompt
from vllm_fleet.launcher import processes

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]

PATIENCE_S = 150.0
CONFIG = """
fabric: {transports: [tcp]}
handoff: {load: always}
launcher: {restarts_max: 100}
"""


def documented(far: SecondHost, port: str) -> dict[str, list[str]]:
    """The commands of docs/ray.md, for these two hosts: by what tells them apart."""
    text = (Path(__file__).parents[2] / "docs" / "ray.md").read_text().split("```bash")[1].split("```")[0]
    for theirs, ours in (
        ("10.0.0.1", far.here),
        ("10.0.0.2", far.there),
        ("6379", port),
        ("/models/my-model", str(MODEL)),
    ):
        text = text.replace(theirs, ours)
    lines = [shlex.split(line, comments=True) for line in text.splitlines()]
    kinds = {"--head": "head", "--address": "node", "up": "up"}
    return {kinds[word]: line for line in lines for word in line if word in kinds}


@dataclass
class Hosts:
    """Both, and the fleet on them."""

    cluster: RayCluster
    far: SecondHost
    node: RayNode
    home: Path

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """A vllm-fleet command, as a user of this cluster gives it."""
        env = {**self.cluster.environ, "VLLM_FLEET_HOME": str(self.home)}
        return subprocess.run([COMMAND, *words], env=env, capture_output=True, text=True, timeout=400, check=False)

    def status(self) -> dict[str, Any]:
        found = self.run("status", "--json")
        assert found.returncode == 0, found.stderr
        told: dict[str, Any] = json.loads(found.stdout)
        return told

    def instances(self) -> dict[str, dict[str, Any]]:
        return {each["name"]: each for each in self.status()["instances"]}

    def pids(self) -> dict[str, int]:
        """The processes of the instances, by the port in their arguments; they are all on this machine."""
        ports = {each["url"].rpartition(":")[2]: name for name, each in self.instances().items()}
        found = {}
        for row in processes.table():
            try:
                words = Path(f"/proc/{row.id.pid}/cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
            if "vllm.entrypoints.openai.api_server" in words and words[words.index("--port") + 1] in ports:
                found[ports[words[words.index("--port") + 1]]] = row.id.pid
        return found

    def log(self, name: str) -> str:
        return (self.home / "default" / "logs" / f"{name}.log").read_text(errors="replace")

    def join(self) -> None:
        _, port = self.cluster.address.rsplit(":", 1)
        self.node = self.cluster.join([*documented(self.far, port)["node"][2:], "--num-cpus", "1"], self.far.prefix)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    why = network.missing()
    if why is not None:
        pytest.skip(why)
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed: pip install 'vllm-fleet[ray]'")
    far = second_host()
    far.reset()
    cluster = RayCluster(host=far.here, cpus=1, head=lambda port: documented(far, str(port))["head"][2:])
    try:
        made = Hosts(cluster, far, cluster.nodes[0], tmp_path_factory.mktemp("ray"))
        made.join()
        config = made.home / "fleet.yaml"
        config.write_text(CONFIG)
        cluster.wait_for_nodes(2)
        words = documented(far, cluster.address.rpartition(":")[2])["up"]
        up = made.run(*words[1:], "--detach", "--config", str(config), "--router-port", "0")
        assert up.returncode == 0, up.stdout + up.stderr
        try:
            yield made
        finally:
            down = made.run("down")
        assert down.returncode == 0, down.stdout + down.stderr
    finally:
        cluster.close()


def until(done: Callable[[], Any], what: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not done():
        assert time.monotonic() < end, what()
        time.sleep(0.5)


def ask_right(hosts: Hosts, count: int, seed: int) -> None:
    """Ask about so many random lists; every answer is the right one."""
    rng = random.Random(seed)
    asked = [make_prompt(rng, rng.randint(30, 200)) for _ in range(count)]
    answers = ask_all(hosts.status()["router"]["url"], [body(one.text, max_tokens=3) for one in asked], 8)
    assert [answer.status for answer in answers] == [200] * count
    assert [answer.text for answer in answers] == [one.value for one in asked]


def test_prefilled_on_one_host_and_decoded_on_the_other(hosts: Hosts) -> None:
    found = hosts.instances()
    assert {found["prefill-0"]["node"], found["decode-0"]["node"]} == {hosts.far.here, hosts.far.there}
    for each in found.values():
        assert each["url"].startswith(f"http://{each['node']}:"), each
    spaces = {name: os.readlink(f"/proc/{pid}/ns/net") for name, pid in hosts.pids().items()}
    assert len(set(spaces.values())) == 2, spaces
    loaded = "vllm:fleet_handoff_bytes_total"
    before, cable = total(scrape(found["decode-0"]["url"]), loaded), hosts.far.sent_bytes()
    ask_right(hosts, 24, seed=1)
    moved = total(scrape(found["decode-0"]["url"]), loaded) - before
    assert moved > 1 << 20
    if found["prefill-0"]["node"] == hosts.far.there:
        assert hosts.far.sent_bytes() - cable > moved


def test_nothing_of_the_fleet_listens_for_everybody(hosts: Hosts) -> None:
    for pid in hosts.pids().values():
        table = Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]
        inodes = set()
        for row in processes.tree(pid, processes.table()):
            folder = Path(f"/proc/{row.pid}/fd")
            inodes |= {os.readlink(folder / name) for name in os.listdir(folder)}
        for line in table:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                assert fields[1].split(":")[0] != "00000000", line


def test_an_instance_that_is_killed_comes_back(hosts: Hosts) -> None:
    before = hosts.instances()["decode-0"]
    pid = hosts.pids()["decode-0"]
    os.kill(pid, signal.SIGKILL)
    until(lambda: hosts.instances()["decode-0"]["state"] != "ready", lambda: hosts.log("supervisor"))
    until(lambda: hosts.instances()["decode-0"]["state"] == "ready", lambda: hosts.log("decode-0"))
    after = hosts.instances()["decode-0"]
    assert after["node"] == before["node"], "the other one is full"
    assert hosts.pids()["decode-0"] != pid
    ask_right(hosts, 8, seed=2)


def test_a_node_that_dies_takes_its_instance_along_and_gives_it_back(hosts: Hosts) -> None:
    there = next(name for name, each in hosts.instances().items() if each["node"] == hosts.far.there)
    pid = processes.identify(hosts.pids()[there])
    assert pid is not None
    hosts.node.kill()
    until(lambda: not processes.alive(pid), lambda: f"{there} outlived its node")
    until(
        lambda: f"node {hosts.far.there} is gone, and {there} with it" in hosts.log("supervisor"),
        lambda: hosts.log("supervisor"),
    )
    if there == "prefill-0":  # decode computes by itself
        ask_right(hosts, 4, seed=3)
    hosts.join()
    until(lambda: hosts.instances()[there]["state"] == "ready", lambda: hosts.log("supervisor"))
    assert hosts.instances()[there]["node"] == hosts.far.there
    ask_right(hosts, 8, seed=4)


def test_a_fleet_that_the_cluster_cannot_hold_is_refused_before_anything_starts(hosts: Hosts) -> None:
    words = ["up", "--name", "large", "--model", str(MODEL), "--router-port", "0", "--cluster", hosts.cluster.address]
    up = hosts.run(*words, "--prefill", "2", "--decode", "2")
    assert up.returncode == 2, up.stdout + up.stderr
    assert up.stderr.splitlines()[-1].startswith("the cluster has no room for "), up.stderr
    assert f"{hosts.far.there} has 0 CPUs free" in up.stderr
