"""config.load: every source, every message."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from vllm_fleet.config.explain import Line, explain
from vllm_fleet.config.load import known_keys, load
from vllm_fleet.core import limits
from vllm_fleet.core.errors import ConfigError


def write(folder: Path, text: str) -> Path:
    file = folder / "fleet.yaml"
    file.write_text(text)
    return file


def problem(tmp_path: Path, text: str, environ: dict[str, str] | None = None, **flags: tuple[str, Any]) -> str:
    file = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load(file, environ=environ or {}, flags={key.replace("__", "."): value for key, value in flags.items()})
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(str(tmp_path), "DIR")


def test_each_source_beats_the_one_before_and_is_remembered(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        "model: org/model\nprefill: 2\ndecode: 2\nrouter: {port: 1, host: 127.0.0.2}\n"
        "vllm_args: [--a]\nenv: {A: a, B: b}\nfabric: {transports: [tcp]}\n",
    )
    environ = {"FLEET_ROUTER__PORT": "2", "FLEET_DECODE": "3", "FLEET_ENV": '{"B": "bb"}', "PATH": "/bin"}
    flags = {"router.port": ("--router-port", 4), "env.C": ("--env", "c"), "vllm_args": ("--vllm-arg", ("--z",))}
    loaded = load(file, environ=environ, flags=flags)
    config = loaded.config
    assert (config.model, config.prefill, config.decode, config.router.port) == ("org/model", 2, 3, 4)
    assert (config.router.host, config.vllm_args) == ("127.0.0.2", ("--z",))
    assert config.env == {"A": "a", "B": "bb", "C": "c"}
    assert config.fabric.transports == ("tcp",)
    assert loaded.origins["prefill"] == "fleet.yaml"
    assert loaded.origins["decode"] == "environment variable FLEET_DECODE"
    assert loaded.origins["router.port"] == "flag --router-port"
    assert loaded.origins["env.A"] == "fleet.yaml"
    assert loaded.origins["env.B"] == "environment variable FLEET_ENV"
    assert "both" not in loaded.origins


def test_environment_values_are_numbers_text_or_json(tmp_path: Path) -> None:
    environ = {
        "FLEET_MODEL": "org/model",
        "FLEET_NAME": "7",
        "FLEET_SERVED_MODEL_NAME": "1",
        "FLEET_HANDOFF__LOAD_S": "2.5",
        "FLEET_VLLM_ARGS": '["--max-model-len", "512"]',
        "FLEET_FABRIC__TRANSPORTS": '["cma"]',
    }
    config = load(None, environ=environ, folder=tmp_path).config
    assert (config.name, config.served_model_name, config.handoff.load_s) == ("7", "1", 2.5)
    assert (config.vllm_args, config.fabric.transports) == (("--max-model-len", "512"), ("cma",))


def test_a_fleet_yaml_beside_the_user_is_found(tmp_path: Path) -> None:
    write(tmp_path, "model: org/model\nname: here\n")
    assert load(None, environ={}, folder=tmp_path).config.name == "here"


def test_relative_models_are_relative_to_where_they_were_written(tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "tiny").mkdir()
    (tmp_path / "elsewhere").mkdir()
    file = write(tmp_path / "config", "model: ./tiny\n")
    loaded = load(file, environ={}, folder=tmp_path / "elsewhere")
    assert loaded.config.model == str(tmp_path / "config" / "tiny")
    file.write_text("model: tiny\n")  # no dot, but there is such a folder
    assert load(file, environ={}, folder=tmp_path / "elsewhere").config.model == str(tmp_path / "config" / "tiny")
    flags = {"model": ("--model", "../x")}
    assert load(file, environ={}, flags=flags, folder=tmp_path / "elsewhere").config.model == str(tmp_path / "x")
    assert load(None, environ={"FLEET_MODEL": "org/x"}, folder=tmp_path).config.model == "org/x"


def test_only_both_means_no_prefill_and_no_decode(tmp_path: Path) -> None:
    loaded = load(write(tmp_path, "model: m\nboth: 2\n"), environ={})
    assert (loaded.config.prefill, loaded.config.decode, loaded.config.both) == (0, 0, 2)
    assert loaded.origins["prefill"] == "default when only 'both' is set"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: m\nprefil: 1\n", "unknown key 'prefil' in fleet.yaml; did you mean 'prefill'?"),
        ("model: m\nport: 1\n", "unknown key 'port' in fleet.yaml; did you mean 'router.port'?"),
        ("model: m\nrouter: {prt: 1}\n", "unknown key 'router.prt' in fleet.yaml; did you mean 'router.port'?"),
        ("model: m\nrouters: {port: 1}\n", "unknown key 'routers' in fleet.yaml; did you mean 'router'?"),
        ("model: m\nqqqqqqq: 1\n", "unknown key 'qqqqqqq' in fleet.yaml"),
        ("model: m\n3: 1\n", "unknown key '3' in fleet.yaml"),
        ("model: m\nprefill: '2'\n", "prefill in fleet.yaml: expected a whole number, found the text '2'"),
        ("model: m\nprefill: true\n", "prefill in fleet.yaml: expected a whole number, found true"),
        ("model: m\nprefill: 1.5\n", "prefill in fleet.yaml: expected a whole number, found the number 1.5"),
        ("model: m\nprefill: -1\n", "prefill in fleet.yaml: expected a number not below 0, found the number -1"),
        ("model: m\nprefill: 0x" + "f" * 5000, "prefill in fleet.yaml: the number is too large"),
        ("model: m\ndecode:\n", "decode in fleet.yaml: expected a whole number, found nothing"),
        ("model: 3\n", "model in fleet.yaml: expected text, found the number 3"),
        (
            "model: m\nname: Big\n",
            "name in fleet.yaml: expected text that matches ^[a-z0-9][a-z0-9-]*$, found the text 'Big'",
        ),
        ("model: m\nname: 2026-01-01\n", "name in fleet.yaml: found a date; put it in quotes if it is meant as text"),
        ("model: m\nrouter: 8000\n", "router in fleet.yaml: expected a mapping, found the number 8000"),
        (
            "model: m\nrouter: {port: 99999}\n",
            "router.port in fleet.yaml: expected a number not above 65535, found the number 99999",
        ),
        ("model: m\nvllm_args: --x\n", "vllm_args in fleet.yaml: expected a list, found the text '--x'"),
        (
            "model: m\nvllm_args: [4096]\n",
            "vllm_args.0 in fleet.yaml: expected text, found the number 4096; put it in quotes: '4096'",
        ),
        ("model: m\nenv: {A: 1}\n", "env.A in fleet.yaml: expected text, found the number 1; put it in quotes: '1'"),
        ("model: m\nenv: [A]\n", "env in fleet.yaml: expected a mapping, found a list"),
        (
            "model: m\nfabric: {transports: []}\n",
            "fabric.transports in fleet.yaml: expected at least 1 in the list, found an empty list",
        ),
        (
            "model: m\nfabric: {transports: [smoke]}\n",
            "fabric.transports.0 in fleet.yaml: expected one of 'auto', 'cma', 'cuda_ipc', 'mooncake', 'nccl', 'nixl' "
            "or 'tcp', found the text 'smoke'",
        ),
        (
            "model: m\nhandoff: {load_s: .inf}\n",
            "handoff.load_s in fleet.yaml: expected a finite number, found the number inf",
        ),
        (
            "model: m\nhandoff: {load_s: 0}\n",
            "handoff.load_s in fleet.yaml: expected a number greater than 0, found the number 0",
        ),
        ("prefill: 1\n", "model is not set; give --model FOLDER, or 'model: FOLDER' in fleet.yaml"),
        ("", "model is not set; give --model FOLDER, or 'model: FOLDER' in fleet.yaml"),
        (
            "model: m\nprefill: 0\ndecode: 0\n",
            "prefill, decode and both are all 0: a fleet needs at least one instance",
        ),
        ("- model\n", "DIR/fleet.yaml must hold a mapping such as 'model: ./my-model', found a list"),
        ("just words\n", "DIR/fleet.yaml must hold a mapping such as 'model: ./my-model', found the text 'just words'"),
        (
            "model: m\nrouter: {port: 1\n",
            "DIR/fleet.yaml, line 3: not valid YAML: expected ',' or '}', but got '<stream end>'",
        ),
        ("model: m\nprefill: !!python/object:os.system {}\n", None),
        ("model: m\nname: 2026-99-99\n", None),
        ("model: m\nname: !!timestamp x\n", None),
        ("model: " + "[" * 5000, "DIR/fleet.yaml: not valid YAML: nested too deeply"),
        ("model: \x00\n", None),
        ("model: m\nenv: &e {A: *e}\n", "env.A in fleet.yaml: more than 100000 values"),
    ],
)
def test_wrong_files(tmp_path: Path, text: str, message: str | None) -> None:
    said = problem(tmp_path, text)
    if message is None:
        assert "fleet.yaml" in said
        assert "not valid YAML" in said
    else:
        assert said == message


def test_prefill_needs_somebody_to_decode(tmp_path: Path) -> None:
    assert problem(tmp_path, "model: m\nprefill: 2\ndecode: 0\n").startswith("prefill is 2 but decode is 0: ")
    said = problem(tmp_path, "model: m\nprefill: 200\ndecode: 200\n")
    assert said == "prefill + decode + both is 400; one fleet has at most 256 instances"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^there is no file .*/absent.yaml$"):
        load(tmp_path / "absent.yaml", environ={})
    with pytest.raises(ConfigError, match=r"^cannot read .*: Is a directory$"):
        load(tmp_path, environ={})
    file = write(tmp_path, "#" * (limits.CONFIG_FILE_BYTES_MAX + 1))
    with pytest.raises(ConfigError, match=r"is larger than 1048576 bytes"):
        load(file, environ={})
    file.write_bytes(b"model: \xff\n")
    with pytest.raises(ConfigError, match=r"is not UTF-8 text \(byte 7\)"):
        load(file, environ={})


def test_wrong_environment_and_flags(tmp_path: Path) -> None:
    good = "model: m\n"
    assert problem(tmp_path, good, {"FLEET_PREFIL": "1"}) == (
        "unknown environment variable FLEET_PREFIL; did you mean 'FLEET_PREFILL'? "
        "(all that begin with FLEET_ are settings)"
    )
    assert problem(tmp_path, good, {"FLEET_ROUTER__PORT": "http"}) == (
        "router.port in environment variable FLEET_ROUTER__PORT: expected a whole number, found the text 'http'"
    )
    assert problem(tmp_path, good, {"FLEET_VLLM_ARGS": "--x"}) == (
        "vllm_args in environment variable FLEET_VLLM_ARGS: expected JSON such as [\"tcp\"], found the text '--x'"
    )
    assert problem(tmp_path, good, {"FLEET_ENV": "[]"}) == (
        "env in environment variable FLEET_ENV: expected a mapping, found an empty list"
    )
    assert problem(tmp_path, good, {"FLEET_NAME": "\udc80"}) == (
        "name in environment variable FLEET_NAME: holds bytes that are not UTF-8 text"
    )
    assert problem(tmp_path, good, router__port=("--router-port", 70000)) == (
        "router.port in flag --router-port: expected a number not above 65535, found the number 70000"
    )


def test_explain_lists_every_key_with_its_origin_and_hides_secrets(tmp_path: Path) -> None:
    file = write(tmp_path, "model: org/m\nenv: {HF_TOKEN: hf_abc, A: b}\nfabric: {transports: [tcp]}\n")
    lines = explain(load(file, environ={"FLEET_PREFILL": "2"}))
    by_key = {line.key: line for line in lines}
    assert [line.key for line in lines if not line.key.startswith("env.")] == [k for k in known_keys() if k != "env"]
    assert by_key["prefill"] == Line("prefill", "2", "environment variable FLEET_PREFILL", "prefill instances")
    assert dataclasses.astuple(by_key["router.port"])[1:3] == ("8000", "default")
    assert (by_key["env.HF_TOKEN"].value, by_key["env.A"].value) == ("(hidden)", "b")
    assert (by_key["fabric.transports"].value, by_key["fabric.transports"].origin) == ('["tcp"]', "fleet.yaml")
    assert by_key["served_model_name"].value == "null"
    assert all(line.description for line in lines)


def test_the_manual_lists_every_key() -> None:
    manual = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
    assert [key for key in known_keys() if f"| `{key}` |" not in manual] == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: smoke", "connector.kind in fleet.yaml: expected one of 'fleet', 'nixl', 'mooncake', 'offloading', "),
        ("kind: nixl, inside: [fleet]", "connector.inside is for kind 'multi', but connector.kind is 'nixl'"),
        ("kind: multi", "connector.inside is empty; kind 'multi' needs it, for instance [fleet, offloading]"),
        ("kind: multi, inside: [fleet, fleet]", "connector.inside names 'fleet' twice"),
        ("kind: multi, inside: [fleet, multi]", "connector.inside.1 in fleet.yaml: expected one of 'fleet', "),
        (
            "kind: multi, inside: [fleet, lmcache, nixl]",
            "connector.inside: 'fleet' and 'nixl' both hand KV over and would write the same keys of "
            "kv_transfer_params, at which vLLM's engine dies; keep one",
        ),
        (
            "kind: lmcache",
            "prefill is 1 and decode is 1, but connector 'lmcache' only keeps KV for its own instance and hands none "
            "over; use 'both' instances, or connector.kind 'multi' with inside [fleet, lmcache]",
        ),
        (
            "kind: multi, inside: [offloading, lmcache]",
            "prefill is 1 and decode is 1, but connector 'offloading' and 'lmcache' only keeps KV",
        ),
        ("kind: mooncake", "prefill is 1 and decode is 1, but the router does not hand over through connector 'moo"),
        ("extra: {a: 1}", "connector.extra: our own connector's settings are the keys under 'handoff' and 'fabric'"),
        ("extra: [a]", "connector.extra in fleet.yaml: expected a mapping, found a list"),
        (
            "kind: multi, inside: [fleet], extra: {nixl: {}}",
            "connector.extra.nixl: with kind 'multi' the keys are names from connector.inside",
        ),
        (
            "kind: multi, inside: [fleet, lmcache], extra: {lmcache: 5}",
            "connector.extra.lmcache: expected a mapping, the settings of 'lmcache'",
        ),
        (
            "kind: multi, inside: [fleet], extra: {fleet: {lease_s: 1}}",
            "connector.extra: our own connector's settings are the keys under 'handoff' and 'fabric'",
        ),
        (
            "kind: multi, inside: [fleet, offloading]",
            "connector.extra.offloading.cpu_bytes_to_use is not set: bytes of host memory that each instance keeps KV "
            "in, for instance 8589934592",
        ),
    ],
)
def test_connectors_that_cannot_work(tmp_path: Path, text: str, message: str) -> None:
    assert problem(tmp_path, f"model: m\nconnector: {{{text}}}\n").startswith(message)


def test_connectors_that_work(tmp_path: Path) -> None:
    both = "model: m\nboth: 2\n"
    offloading = "connector: {kind: offloading, extra: {cpu_bytes_to_use: 1000000000}}\n"
    assert load(write(tmp_path, both + offloading), environ={}).config.connector.extra == {"cpu_bytes_to_use": 10**9}
    for kind in ("mooncake", "lmcache", "nixl", "fleet"):
        assert load(write(tmp_path, f"{both}connector: {{kind: {kind}}}\n"), environ={}).config.connector.kind == kind
    environ = {
        "FLEET_MODEL": "m",
        "FLEET_CONNECTOR__KIND": "multi",
        "FLEET_CONNECTOR__INSIDE": '["fleet", "offloading"]',
        "FLEET_CONNECTOR__EXTRA": '{"offloading": {"cpu_bytes_to_use": 5, "secondary_tiers": [{"type": "fs"}]}}',
    }
    loaded = load(None, environ=environ, folder=tmp_path / "none")
    assert loaded.config.connector.inside == ("fleet", "offloading")
    lines = {line.key: line for line in explain(loaded)}
    assert lines["connector.inside"].value == '["fleet", "offloading"]'
    assert lines["connector.extra"].origin == "environment variable FLEET_CONNECTOR__EXTRA"
    said = problem(tmp_path, "model: m\nenv: {VLLM_NIXL_SIDE_CHANNEL_PORT: '1'}\n")
    assert said == "env must not hold VLLM_NIXL_SIDE_CHANNEL_PORT: the launcher gives each instance a value of its own"
