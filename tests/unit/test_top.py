"""`vllm-fleet top`: what follows from two looks at a fleet, and how it is drawn."""

from __future__ import annotations

import dataclasses
import http.server
import io
import json
import os
import threading
from pathlib import Path

import msgspec
import pytest
from rich.console import Console
from typer.testing import CliRunner

from vllm_fleet.cli.main import app
from vllm_fleet.cli.top import view
from vllm_fleet.core.errors import FleetError
from vllm_fleet.launcher.page import Page, quantile
from vllm_fleet.launcher.processes import ProcessId, boot_id, identify
from vllm_fleet.launcher.record import FleetRecord, ProcessRecord, write_record
from vllm_fleet.launcher.rundir import RunDir
from vllm_fleet.launcher.top import Look, top

INF = float("inf")
ME = ProcessId(1, 1)


def instance(name: str, role: str, state: str = "ready") -> ProcessRecord:
    return ProcessRecord(name, "instance", role, f"http://{name}:1", state, 0.0, "/log")  # type: ignore[arg-type]


def record(*instances: ProcessRecord) -> FleetRecord:
    router = ProcessRecord(
        "router", "router", "router", "http://127.0.0.1:8000", "ready", 0.0, "/log", admin_url="http://a:2"
    )
    return FleetRecord("default", "tiny-llama", "boot", ME, "serving", 8.0, (router, *instances))


def engine(running: int, waiting: int, kv: float, tokens: int, loaded: int = 0, failed: int = 0) -> Page:
    text = f"""# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{{engine="0",model_name="m"}} {running}
vllm:num_requests_waiting{{engine="0",model_name="m"}} {waiting}
vllm:kv_cache_usage_perc{{engine="0",model_name="m"}} {kv}
vllm:kv_cache_usage_perc{{engine="1",model_name="m"}} 0.01
vllm:generation_tokens_total{{engine="0",model_name="m"}} {tokens}
vllm:prompt_tokens_total{{engine="0",model_name="m"}} {10 * tokens}
vllm:fleet_handoffs_total{{engine="0",model_name="m",outcome="loaded"}} {loaded}
vllm:fleet_handoffs_total{{engine="0",model_name="m",outcome="recomputed"}} {failed}
"""
    return Page(text, ("vllm:",))


def router(requests: int, errors: int, buckets: tuple[int, int, int], in_flight: int = 3) -> Page:
    name, at = "vllm_fleet_router_time_to_first_byte_seconds_bucket", '{le="%s",route="/v1/completions"} %d\n'
    text = "".join(name + at % pair for pair in zip(("0.1", "0.5", "+Inf"), buckets, strict=True))
    text += f"""vllm_fleet_router_requests_total{{route="/v1/completions",status="200"}} {requests}
vllm_fleet_router_requests_total{{route="/v1/completions",status="502"}} {errors}
vllm_fleet_router_requests_total{{route="/metrics",status="200"}} 1000
vllm_fleet_router_in_flight{{instance="decode-0"}} {in_flight}
vllm_fleet_router_retries_total 4
vllm_fleet_router_resumes_total{{way="tokens"}} 2
vllm_fleet_router_resumes_total{{way="none"}} 1
vllm_fleet_router_handoffs_total{{outcome="handed_off"}} 9
vllm_fleet_router_handoffs_total{{outcome="local"}} 3
"""
    return Page(text, ("vllm_fleet_router_",))


FLEET = record(instance("decode-0", "decode"), instance("prefill-10", "prefill"), instance("prefill-2", "prefill"))
STATES = {"decode-0": "ready", "prefill-10": "suspect", "prefill-2": "ready"}
BEFORE = Look(10.0, FLEET, STATES, {"decode-0": engine(1, 0, 0.1, 100)}, router(10, 0, (5, 10, 10)))
NOW = Look(
    12.0,
    FLEET,
    STATES,
    {"decode-0": engine(2, 1, 0.953, 700, 7, 1), "prefill-2": engine(1, 0, 0.2, 1)},
    router(40, 2, (5, 30, 40)),
)

# Pages and quantiles -----------------------------------------------------------------------------------------------


def test_a_page_is_read_for_what_is_wanted() -> None:
    page = Page('a_x{l="1,\\"}"} 2\na_x{l="2"} 3.5\na_y nan\nb_x 1\na_x broken\na_z\n# a_x 9\n', ("a_",))
    assert page.total("a_x") == 5.5
    assert page.total("a_x", l="2") == 3.5
    assert page.total("a_x", l='1,\\"}') == 2.0
    assert (page.total("b_x"), page.has("b_x"), page.largest("a_x"), page.largest("b_x")) == (0.0, False, 3.5, None)


@pytest.mark.parametrize(
    ("share", "before", "after", "value"),
    [
        (0.5, {}, {}, None),
        (0.5, {1.0: 4, INF: 4}, {1.0: 4, INF: 4}, None),
        (0.5, {}, {1.0: 10, 2.0: 10, INF: 10}, 0.5),
        (0.5, {1.0: 10, 2.0: 10, INF: 10}, {1.0: 10, 2.0: 20, INF: 20}, 1.5),
        (0.99, {}, {1.0: 1, INF: 100}, 1.0),  # above the last end nothing is known
        (1.0, {}, {1.0: 3, 2.0: 4, INF: 4}, 2.0),
    ],
)
def test_quantiles(share: float, before: dict[float, float], after: dict[float, float], value: float | None) -> None:
    assert quantile(share, before, after) == value


# Two looks ---------------------------------------------------------------------------------------------------------


def test_what_happened_between_two_looks() -> None:
    shown = top(NOW, BEFORE, BEFORE)
    assert [row.name for row in shown.instances] == ["prefill-2", "prefill-10", "decode-0"]
    two, ten, decode = shown.instances
    assert (decode.state, decode.in_flight, decode.running, decode.waiting, decode.kv_used) == ("ready", 3, 2, 1, 0.953)
    assert (decode.tokens_s, decode.prompt_tokens_s, decode.handoffs, decode.failures) == (300.0, 3000.0, 7, 1)
    assert (two.tokens_s, two.running) == (None, 1)  # seen once only
    assert (ten.state, ten.running, ten.in_flight) == ("suspect", None, 0)  # it did not answer
    assert shown.router is not None
    assert (shown.router.requests_s, shown.router.errors_s, shown.router.refused_s) == (16.0, 1.0, 0.0)
    assert shown.router.first_byte_p50_s == pytest.approx(0.1 + 0.4 * 15 / 20)
    assert (shown.router.retries, shown.router.resumes) == (4, 2)
    assert (shown.router.handed_off, shown.router.requests, shown.window_s) == (9, 12, 2.0)
    assert msgspec.json.decode(msgspec.json.encode(shown))["instances"][2]["tokens_s"] == 300.0


def test_who_was_started_anew_and_who_is_silent() -> None:
    again = dataclasses.replace(
        NOW, at=14.0, pages={"decode-0": engine(0, 0, 0.0, 50)}, router=router(3, 0, (1, 2, 3)), states={}
    )
    shown = top(again, NOW, NOW)
    assert shown.instances[2].tokens_s == 25.0
    assert shown.router is not None
    assert shown.router.requests_s == 1.5
    assert shown.router.first_byte_p50_s == pytest.approx(0.3)
    assert shown.remarks == ("the controller does not answer: states are the supervisor's",)
    silent = top(dataclasses.replace(NOW, router=None), BEFORE, None)
    assert (silent.router, silent.instances[2].in_flight) == (None, None)
    assert silent.remarks == ("the router does not answer",)


# Drawn -------------------------------------------------------------------------------------------------------------


def drawn(width: int, height: int = 100) -> list[str]:
    console = Console(width=width, record=True, file=io.StringIO(), highlight=False)
    console.print(view(top(NOW, BEFORE, BEFORE), width, height))
    return console.export_text().splitlines()


@pytest.mark.parametrize("width", [40, 52, 66, 76, 80, 96, 120, 200])
def test_it_fits_and_loses_no_instance(width: int) -> None:
    lines = drawn(width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    for name in ("prefill-2", "prefill-10", "decode-0", "suspect", "95%", "errors 1/s"):
        assert name in text, text
    assert "…" not in text[text.index("NAME") :]
    assert ("PROMPT/S" in text) == (width >= 96)


def test_what_does_not_fit_the_height_is_said() -> None:
    text = drawn(120, 8)
    assert len(text) <= 8
    assert "… and 2 more; --once shows all" in text[-1]


# The command -------------------------------------------------------------------------------------------------------


class _Pages(http.server.BaseHTTPRequestHandler):
    """Counters that grow with each look; one page for the router and the instance."""

    looks = 0

    def do_GET(self) -> None:
        type(self).looks += 1
        text = f"""vllm_fleet_router_requests_total{{route="/v1/completions",status="200"}} {10 * self.looks}
vllm_fleet_router_in_flight{{instance="both-0"}} 4
vllm:num_requests_running{{engine="0"}} 2
vllm:generation_tokens_total{{engine="0"}} {100 * self.looks}
"""
        self.send_response(200 if self.path == "/metrics" else 404)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_FLEET_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "100")
    me = identify(os.getpid())
    assert me is not None
    run = RunDir(tmp_path / "default")
    run.acquire()
    run.prepare(())
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Pages) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        made = (
            ProcessRecord("router", "router", "router", "http://127.0.0.1:9", "ready", 0.0, "/log", me, admin_url=url),
            ProcessRecord("controller", "controller", "controller", "http://127.0.0.1:9", "ready", 0.0, "/log", me),
            ProcessRecord("both-0", "instance", "both", url, "ready", 0.0, "/log", me),
            ProcessRecord("both-1", "instance", "both", "http://127.0.0.1:9", "starting", 0.0, "/log", me),
        )
        write_record(run, FleetRecord("default", "m", boot_id(), me, "serving", 8.0, made))
        asked = CliRunner().invoke(app, ["top", "--once", "--json", "--interval", "0.2"])
        text = CliRunner().invoke(app, ["top", "--once", "--interval", "0.2"]).stdout
        server.shutdown()
    run.release()
    assert asked.exit_code == 0, asked.output
    shown = json.loads(asked.stdout)
    assert shown["router"]["url"] == "http://127.0.0.1:9"
    assert shown["router"]["requests_s"] > 0
    assert shown["remarks"] == ["the controller does not answer: states are the supervisor's"]
    first, second = shown["instances"]
    assert (first["in_flight"], first["running"]) == (4, 2)
    assert first["tokens_s"] > 0
    assert (second["state"], second["running"]) == ("starting", None)
    assert "both-0  both  ready" in text
    assert "since start" in text


def test_no_fleet_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_FLEET_HOME", str(tmp_path))
    found = CliRunner().invoke(app, ["top", "--once"])
    assert isinstance(found.exception, FleetError)
    assert "no fleet named 'default' runs" in str(found.exception)
