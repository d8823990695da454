"""A prefill instance killed for good: clients do not notice, blocks are freed."""

from __future__ import annotations

import random
import threading

import psutil
import pytest

from tests.conftest import SharedFleets, running_fleet
from tests.faults.test_deaths import decode_answers, hold, outcome, states, usage, wait_for
from tests.integration.asking import ask_all, body
from vllm_fleet.bench.recall import make_prompt

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]


def kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        process.kill()


def test_a_prefill_killed_between_its_answer_and_the_transfer(
    shared_fleets: SharedFleets, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """And one killed under load. Its own fleet, since an instance is gone afterwards."""
    shared_fleets.stop()
    home = tmp_path_factory.mktemp("killed")
    config = home / "fleet.yaml"
    config.write_text("launcher: {restarts_max: 0}\n")  # it stays away
    with running_fleet(home, "--config", str(config), "--prefill", "2") as fleet:
        prompt, params = hold(fleet.urls["prefill-1"], 5)
        prompts = [make_prompt(random.Random(seed), 200) for seed in range(30)]
        requests = [body(p.text, max_tokens=3) for p in prompts]
        victims = [psutil.Process(fleet.pids["prefill-1"])]
        victims += victims[0].children(recursive=True)
        killer = threading.Timer(0.5, kill, [victims])
        killer.start()
        answers = ask_all(fleet.router, requests, 8)
        killer.join()
        psutil.wait_procs(victims, timeout=10)
        assert not any(process.is_running() for process in victims)
        assert [(answer.status, answer.text) for answer in answers] == [(200, p.value) for p in prompts]
        recomputed = outcome(fleet.decode, "recomputed")
        assert decode_answers(fleet, prompt, params) == prompt.value
        assert outcome(fleet.decode, "recomputed") == recomputed + 1
        wait_for("prefill-1 is given up", lambda: states(fleet)["prefill-1"] == "given_up", 20)
        answers = ask_all(fleet.router, requests, 8)
        assert [(answer.status, answer.text) for answer in answers] == [(200, p.value) for p in prompts]
        wait_for("decode's blocks are free", lambda: usage(fleet.decode) == 0.0, 20)
