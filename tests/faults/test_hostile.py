"""Hostile bytes and hostile parameters straight at the processes of a running fleet (trust.md, tests 18 to 27).

Every port our processes listen on gets garbage, HTTP, a pickle and an oversized frame; the service goes on, nothing is
executed. Forged kv_transfer_params straight at an instance are refused or ignored; the engine lives.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import socket
import struct
import urllib.error
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import RunningFleet
from tests.integration.asking import body
from vllm_fleet.bench.plain import post, scrape, total
from vllm_fleet.bench.recall import make_prompt
from vllm_fleet.config.connector import read_token
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import FleetError
from vllm_fleet.net.channel import Channel, Credentials, connect
from vllm_fleet.net.sockets import dial
from vllm_fleet.wire import fabric as wire
from vllm_fleet.wire.auth import ClientHandshake
from vllm_fleet.wire.ticket import FIELD, Ticket, WorkerAddress, prompt_digest, transfer_params

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]


def family(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def listening(fleet: RunningFleet) -> dict[int, psutil.Process]:
    """Every TCP port that a process of the fleet listens on."""
    record = json.loads((fleet.home / "default" / "fleet.json").read_text())
    pids = [entry["id"][0] for entry in record["processes"]]
    ports: dict[int, psutil.Process] = {}
    for pid in pids:
        for process in family(pid):
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    assert connection.laddr.ip in ("127.0.0.1", "::1"), f"{process} listens on {connection.laddr}"
                    ports[connection.laddr.port] = process
    return ports


_FABRIC_PORTS: dict[str, dict[str, int]] = {}


def fabric_ports(fleet: RunningFleet) -> dict[str, int]:
    """The fabric port of each instance: the one of its workers' ports where the fleet's token is proved."""
    if fleet.router not in _FABRIC_PORTS:
        owners = {process.pid: name for name, pid in fleet.pids.items() for process in family(pid)[1:]}
        ports = {port: owners[process.pid] for port, process in listening(fleet).items() if process.pid in owners}
        with ThreadPoolExecutor(24) as pool:
            proved = list(pool.map(lambda port: proves(fleet, port), ports))
        found = {name: port for (port, name), good in zip(ports.items(), proved, strict=True) if good}
        assert set(found) == set(fleet.pids)
        _FABRIC_PORTS[fleet.router] = found
    return _FABRIC_PORTS[fleet.router]


def proves(fleet: RunningFleet, port: int) -> bool:
    try:
        trusted(fleet, port, 2.0).close()
    except FleetError:
        return False
    return True


def trusted(fleet: RunningFleet, port: int, seconds: float = 5.0) -> Channel:
    token = read_token(fleet.home / "default" / "token")
    return connect("127.0.0.1", port, Credentials("default", token), Deadline.after(seconds, "test"))


def works(fleet: RunningFleet, seed: int) -> None:
    """The fleet answers rightly, with KV moved, and no process was replaced."""
    prompt = make_prompt(random.Random(seed), 60)
    answer, headers = post(f"{fleet.router}/v1/completions", body(prompt.text, max_tokens=3))
    assert answer["choices"][0]["text"] == prompt.value
    assert headers["x-fleet-handoff"] == "handed_off"
    assert {instance["name"]: instance["pid"] for instance in fleet.status()["instances"]} == fleet.pids


def send(port: int, payload: bytes) -> bytes:
    """Send bytes to a port and read until it closes or is silent for a moment."""
    received = b""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=2) as connected:
        connected.settimeout(1.0)
        connected.sendall(payload)
        connected.shutdown(socket.SHUT_WR)
        while len(received) < 65536:
            got = connected.recv(4096)
            if not got:
                break
            received += got
    return received


def pickle_bomb(canary: Path) -> bytes:
    """Bytes that create ``canary`` when unpickled: written out by hand, since nothing here may import pickle."""
    return b"cos\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR."


def test_hostile_bytes_on_every_port(cma_fleet: RunningFleet, tmp_path: Path) -> None:
    canary = tmp_path / "executed"
    bomb = pickle_bomb(canary)
    payloads = [
        random.Random(1).randbytes(4096),
        b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n",
        bytes.fromhex("160301020001000000"),
        bomb,
        struct.pack(">I", len(bomb)) + bomb,
        struct.pack(">I", 2**32 - 1) + b"x" * 64,
        struct.pack(">Q", 2**63) + b"x" * 64,
        b"",
    ]
    ports = listening(cma_fleet)
    assert len(ports) >= 6  # controller, router, two servers, two workers
    with ThreadPoolExecutor(24) as pool:
        list(pool.map(send, *zip(*itertools.product(ports, payloads), strict=True)))
    assert not canary.exists()
    assert set(ports) <= set(listening(cma_fleet))
    works(cma_fleet, 1)


def test_a_wrong_token_gets_nothing(cma_fleet: RunningFleet) -> None:
    for port in fabric_ports(cma_fleet).values():
        with pytest.raises(FleetError):
            connect("127.0.0.1", port, Credentials("default", bytes(32)), Deadline.after(5, "test"))
        token = read_token(cma_fleet.home / "default" / "token")
        with pytest.raises(FleetError):
            connect("127.0.0.1", port, Credentials("another", token), Deadline.after(5, "test"))
    works(cma_fleet, 2)


def test_a_replayed_handshake_gets_nothing(cma_fleet: RunningFleet) -> None:
    token = read_token(cma_fleet.home / "default" / "token")
    deadline = Deadline.after(5, "test")
    port = fabric_ports(cma_fleet)["prefill-0"]
    client = ClientHandshake(token, "default")
    with contextlib.closing(Channel(dial("127.0.0.1", port, deadline), "first")) as first:
        first.send(client.start(), deadline)
        proof = client.receive(first.receive(deadline))
        assert proof is not None
        first.send(proof, deadline)
        client.receive(first.receive(deadline))
        assert client.done
    with contextlib.closing(Channel(dial("127.0.0.1", port, deadline), "second")) as second:
        second.send(client.start(), deadline)
        second.receive(deadline)
        second.send(proof, deadline)
        with pytest.raises(FleetError):
            second.receive(deadline)
    works(cma_fleet, 3)


def answer(channel: Channel, question: wire.Question) -> wire.Answer:
    deadline = Deadline.after(10, "test")
    channel.send(wire.encode(question), deadline)
    found: wire.Answer = wire.decode_answer(channel.receive(deadline))
    return found


def test_hostile_questions_of_a_trusted_peer(cma_fleet: RunningFleet) -> None:
    """Even with the token, a peer names no address and gets no block that is not held for it."""
    port, unknown, prompt = fabric_ports(cma_fleet)["prefill-0"], "no-such-transfer", bytes(32)
    with contextlib.closing(trusted(cma_fleet, port)) as channel:
        for question in (wire.Open(unknown, prompt, "nobody"), wire.Read("no-such-grant", "pool", bytes(24))):
            assert isinstance(answer(channel, question), wire.Denied)
        assert answer(channel, wire.Close(unknown, taken=True)) == wire.Closed(valid=False)
    with contextlib.closing(trusted(cma_fleet, port)) as heard, contextlib.closing(trusted(cma_fleet, port)) as channel:
        assert answer(heard, wire.Follow("hostile")) == wire.Following()
        described = answer(channel, wire.Describe())
        assert isinstance(described, wire.Description)
        first_bytes = struct.pack("<3q", 0, 0, 64)
        assert answer(channel, wire.Open(unknown, prompt, "hostile")) == wire.Opened((), 0)  # it may begin yet
        for handle in described.handles:
            assert answer(channel, wire.Digest(unknown, handle.pool, first_bytes)) == wire.Denied("not_granted")
        assert answer(channel, wire.Close(unknown, taken=False)) == wire.Closed(valid=True)
        assert answer(channel, wire.Open(unknown, prompt, "hostile")) == wire.Denied("already_open")
    with contextlib.closing(trusted(cma_fleet, port)) as channel:
        channel.send(b"\xc1 no message", Deadline.after(10, "test"))
        with pytest.raises(FleetError):
            channel.receive(Deadline.after(5, "test"))
    works(cma_fleet, 4)


def hostile_params(fleet: RunningFleet, prompt: str) -> Iterator[Any]:
    """kv_transfer_params of somebody who wants to break or steer an engine."""
    remote = {"do_remote_prefill": True, "do_remote_decode": False}
    yield {**remote}
    yield {**remote, "remote_host": "192.0.2.1", "remote_port": 1, "remote_block_ids": [[0, 1, 2]], "tp_size": 10**9}
    yield {**remote, FIELD: "AAAA"}
    yield {**remote, FIELD: {"a": [1]}}
    yield {**remote, FIELD: "A" * 200_000}
    yield {**remote, "remote_block_ids": [[-1, 2**40]], "remote_engine_id": "x", "remote_request_id": 7}
    yield {"do_remote_prefill": True, "do_remote_decode": True, "remote_num_tokens": -5}
    yield {"do_remote_prefill": "yes", "do_remote_decode": 3}
    yield {}
    forged = Ticket("t", "e", 64, prompt_digest(list(range(64)), None, None), (WorkerAddress("127.0.0.1", 9),))
    yield transfer_params(forged, bytes(32), request_id="r", block_ids=[[1]])
    token = read_token(fleet.home / "default" / "token")
    yield transfer_params(forged, token, request_id="r", block_ids=[[1]])  # signed, but for another prompt
    yield "a string"
    yield [1, 2]
    yield {"nested": json.loads("[" * 200 + "]" * 200)}


def answered(url: str, request: dict[str, Any]) -> tuple[int, str]:
    """Status and text of a completion; no text when it is refused."""
    try:
        answer, _ = post(url, request)
    except urllib.error.HTTPError as error:
        return error.code, ""
    return 200, answer["choices"][0]["text"]


@pytest.mark.parametrize("victim", ["decode-0", "prefill-0"])
def test_hostile_params_straight_at_an_instance(cma_fleet: RunningFleet, victim: str) -> None:
    url = cma_fleet.urls[victim]
    before = total(scrape(url), "vllm:fleet_handoffs_total", outcome="refused")
    for index, params in enumerate(hostile_params(cma_fleet, "")):
        prompt = make_prompt(random.Random(100 + index), 30)
        status, text = answered(
            f"{url}/v1/completions", {**body(prompt.text, max_tokens=3), "kv_transfer_params": params}
        )
        assert (status, text) in ((200, prompt.value), (400, "")), params
    assert total(scrape(url), "vllm:fleet_handoffs_total", outcome="refused") >= before + 8
    works(cma_fleet, 5)


def test_a_ticket_is_good_for_one_use_and_one_prompt(cma_fleet: RunningFleet) -> None:
    prompt, other = (make_prompt(random.Random(seed), 60) for seed in (200, 201))
    hold = {"do_remote_decode": True, "do_remote_prefill": False}
    held, _ = post(
        f"{cma_fleet.prefill}/v1/completions", {**body(prompt.text, max_tokens=1), "kv_transfer_params": hold}
    )
    params = held["kv_transfer_params"]
    url = f"{cma_fleet.decode}/v1/completions"
    before = scrape(cma_fleet.decode)
    first, _ = post(url, {**body(prompt.text, max_tokens=3), "kv_transfer_params": params})
    salted = {**body(prompt.text, max_tokens=3), "cache_salt": "another-tenant", "kv_transfer_params": params}
    second, _ = post(url, salted)
    third, _ = post(url, {**body(other.text, max_tokens=3), "kv_transfer_params": params})
    after = scrape(cma_fleet.decode)
    assert first["choices"][0]["text"] == second["choices"][0]["text"] == prompt.value
    assert third["choices"][0]["text"] == other.value
    for outcome, wanted in (("loaded", 1), ("refused", 2)):
        name = "vllm:fleet_handoffs_total"
        assert total(after, name, outcome=outcome) - total(before, name, outcome=outcome) == wanted, outcome
