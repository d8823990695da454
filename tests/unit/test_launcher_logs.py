"""launcher.logs: what a dead child's log says, and following a growing one."""

from __future__ import annotations

from pathlib import Path

from vllm_fleet.core import limits
from vllm_fleet.launcher.logs import Follower, port_taken, summary, tail, why

VLLM_DEATH = """\
(APIServer pid=10) INFO 11-21 06:42:00 [api_server.py:100] vLLM API server version 0.32.0
(EngineCore pid=11) ERROR 11-21 06:42:01 [core.py:700] EngineCore failed to start.
(EngineCore pid=11) ERROR 11-21 06:42:01 [core.py:700] Traceback (most recent call last):
(EngineCore pid=11) ERROR 11-21 06:42:01 [core.py:700]   File "/x/core.py", line 690, in run_engine_core
(EngineCore pid=11) ERROR 11-21 06:42:01 [core.py:700]     engine_core = EngineCoreProc(*args, **kwargs)
(EngineCore pid=11) ERROR 11-21 06:42:01 [core.py:700]   File "/x/worker.py", line 12, in load
(EngineCore pid=11) ERROR 11-21 06:42:01 [core.py:700]     raise ValueError("no dtype")
(EngineCore pid=11) ERROR 11-21 06:42:01 [core.py:700] ValueError: no dtype
(EngineCore pid=11) Process EngineCore:
(EngineCore pid=11) Traceback (most recent call last):
(EngineCore pid=11)   File "/x/process.py", line 1, in run
(EngineCore pid=11)     self.run()
(EngineCore pid=11) ValueError: no dtype
(APIServer pid=10) Traceback (most recent call last):
(APIServer pid=10)   File "/x/api_server.py", line 5, in main
(APIServer pid=10)     uvloop.run()
(APIServer pid=10) RuntimeError: Engine core initialization failed. See root cause above.
""".splitlines()


def test_the_root_cause_comes_first_and_once() -> None:
    lines = why(VLLM_DEATH)
    assert lines == [
        '  File "/x/worker.py", line 12, in load',
        '    raise ValueError("no dtype")',
        "ValueError: no dtype",
        '  File "/x/api_server.py", line 5, in main',
        "    uvloop.run()",
        "RuntimeError: Engine core initialization failed. See root cause above.",
    ]
    assert summary(lines) == "ValueError: no dtype"


def test_messages_of_several_lines_are_kept() -> None:
    lines = why(
        [
            "Traceback (most recent call last):",
            '  File "a.py", line 1, in f',
            "    g()",
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig",
            "  Value error, max_model_len is too large",
            "INFO 11-21 06:42:00 [x.py:1] bye",
        ]
    )
    assert lines[2:] == [
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig",
        "  Value error, max_model_len is too large",
    ]


def test_without_a_traceback_errors_then_last_words() -> None:
    usage = ["usage: api_server.py [-h]", "  lots of text", "api_server.py: error: unrecognized arguments: --foo"]
    assert why(usage) == ["api_server.py: error: unrecognized arguments: --foo"]
    assert summary(why(usage)) == usage[-1]
    assert why(["INFO 11-21 06:42:00 [x.py:1] a", "(X pid=1) ERROR 11-21 06:42:00 [x.py:1] broken"]) == ["broken"]
    assert why([f"line {at}" for at in range(50)]) == [f"line {at}" for at in range(38, 50)]
    assert why([]) == []
    assert summary([]) == ""


def test_no_more_than_the_limit() -> None:
    assert len(why([f"ERROR 11-21 06:42:00 [x.py:1] {at}" for at in range(1000)])) == limits.LOG_TAIL_LINES
    crowd = [f"Traceback (most recent call last):\nValueError: {at}" for at in range(1000)]
    assert len(why("\n".join(crowd).splitlines())) == limits.LOG_TAIL_LINES


def test_a_taken_port_is_recognised() -> None:
    assert port_taken(["OSError: [Errno 98] Address already in use"])
    assert port_taken(["controller.port: port 7000 on 127.0.0.1 is taken; choose another, or 0 for a free one"])
    assert not port_taken(["ValueError: no dtype"])


def test_only_the_end_of_a_long_log_is_read(tmp_path: Path) -> None:
    file = tmp_path / "x.log"
    assert tail(file) == []
    file.write_bytes(b"x" * 100 + b"\n" + b"y" * limits.LOG_TAIL_BYTES + b"\n\xff\n")
    lines = tail(file)
    assert (lines[-1], len("\n".join(lines)) < limits.LOG_TAIL_BYTES + 10) == ("�", True)


def test_a_follower_gives_whole_lines_and_notices_a_new_log(tmp_path: Path) -> None:
    file = tmp_path / "x.log"
    follower = Follower(file)
    assert follower.lines() == []
    file.write_text("one\ntw")
    assert follower.lines() == ["one"]
    assert follower.rest() == "tw"
    with file.open("a") as stream:
        stream.write("o\n")
    assert follower.lines() == ["two"]
    file.rename(tmp_path / "x.log.1")
    file.write_text("new\n")
    assert follower.lines() == ["new"]
    assert Follower(file, from_end=True).lines() == []
    file.write_text("z" * (3 * limits.LOG_FOLLOW_BYTES))
    long = Follower(file)
    assert "".join("".join(long.lines()) for _ in range(4)) + long.rest() == "z" * (3 * limits.LOG_FOLLOW_BYTES)
