"""A supervisor in the background: a process of its own session that gets the configuration on its standard input."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Mapping

from vllm_fleet.config.fleet import FleetConfig
from vllm_fleet.core.errors import ConfigError, Corrupt, FleetError
from vllm_fleet.launcher import logs
from vllm_fleet.launcher.reactor import KILL_GRACE_S
from vllm_fleet.launcher.record import FleetRecord, read_record
from vllm_fleet.launcher.rundir import RunDir
from vllm_fleet.launcher.up import SUPERVISOR, check, refuse_orphans, run_folder
from vllm_fleet.launcher.view import Outcome, View

TURN_S = 0.1


def up_detached(config: FleetConfig, environ: Mapping[str, str], view: View) -> Outcome:
    """Start the fleet in the background and show it until it is ready (code 0) or has failed.

    Raises:
        ConfigError: a setting is wrong; nothing was started.
        Busy: a fleet of this name runs already.
        KeyboardInterrupt: as the user asked; what was started is stopped.
    """
    check(config, environ)
    run = run_folder(config.name, environ)
    run.acquire()  # refuses what the background process would refuse, with the same words
    try:
        refuse_orphans(run)
        run.clear()
        run.rotate_log(SUPERVISOR)
    finally:
        run.release()
    process = _spawn(config, environ, run)
    try:
        return _follow(process, run, view, config.launcher.stop_s)
    except BaseException:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(config.launcher.stop_s + KILL_GRACE_S + 2.0)
        raise


def _spawn(config: FleetConfig, environ: Mapping[str, str], run: RunDir) -> subprocess.Popen[bytes]:
    try:
        with run.log_file(SUPERVISOR).open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "vllm_fleet.launcher"],
                env=dict(environ), stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
    except OSError as error:
        raise FleetError(f"cannot start the supervisor: {error}") from error
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError), process.stdin:  # it died at once: its log says why
        process.stdin.write(config.model_dump_json().encode())
    return process


def _follow(process: subprocess.Popen[bytes], run: RunDir, view: View, stop_s: float) -> Outcome:
    while True:
        ended = process.poll() is not None
        record = _own_record(process, run)
        if record is not None:
            view.show(record)
            if record.phase == "serving":
                view.ready(record)
                process.returncode = 0  # it outlives us on purpose; no warning about that
                return Outcome(0)
        if ended:
            return _failure(process, run, record)
        time.sleep(TURN_S)


def _own_record(process: subprocess.Popen[bytes], run: RunDir) -> FleetRecord | None:
    try:
        record = read_record(run)
    except Corrupt:
        return None
    return record if record is not None and record.supervisor.pid == process.pid else None


def _failure(process: subprocess.Popen[bytes], run: RunDir, record: FleetRecord | None) -> Outcome:
    log_file = run.log_file(SUPERVISOR)
    if record is not None and record.reason:
        return Outcome(1, record.reason, record.lines, str(run.logs_folder))
    said = [line for line in logs.tail(log_file) if line.strip()]
    if process.returncode == 2 and said:
        raise ConfigError(said[-1])
    reason = said[-1] if said else f"the supervisor ended with exit code {process.returncode}"
    return Outcome(1, reason, (), str(log_file))
