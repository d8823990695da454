"""FleetConfig from defaults < fleet.yaml < environment < flags, remembering where each value came from.

The one reader of ``os.environ``. Keys are dotted (``router.port``); the environment variable of a key is ``FLEET_`` and
the key in capitals with ``__`` for each dot (``FLEET_ROUTER__PORT``). A later source replaces the whole value; only
``env`` is merged, name by name.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from vllm_fleet.config.checks import check_counts, check_faults, check_store
from vllm_fleet.config.fleet import FleetConfig, Part
from vllm_fleet.config.front import check_front
from vllm_fleet.config.problems import found, sentence
from vllm_fleet.config.upstream import check_connector
from vllm_fleet.core import limits
from vllm_fleet.core.errors import ConfigError

ENVIRONMENT_PREFIX = "FLEET_"
DEFAULT_FILE = "fleet.yaml"
COUNTS = ("prefill", "decode", "both")


@dataclass(frozen=True)
class Loaded:
    """A checked configuration, and the origin of each of its values by dotted key."""

    config: FleetConfig
    origins: Mapping[str, str]


@dataclass(frozen=True)
class Given:
    """One value somebody set, and where."""

    value: Any
    origin: str
    folder: Path | None = None
    """Folder that relative paths in the value are relative to; None: the current one."""


def process_environment() -> dict[str, str]:
    """A copy of this process's environment; nothing else reads it."""
    return dict(os.environ)


def load(
    file: Path | None = None,
    *,
    environ: Mapping[str, str],
    flags: Mapping[str, tuple[str, Any]] | None = None,
    folder: Path | None = None,
) -> Loaded:
    """The configuration of one fleet.

    Args:
        file: the YAML file; None takes ``fleet.yaml`` of ``folder`` (default: the current one) if there is one.
        environ: the environment; only names that begin with FLEET_ are looked at.
        flags: what the command line gave: dotted key -> (the flag as typed, value).

    Raises:
        ConfigError: one sentence that names the key, where it was set, what was expected and what was found.
    """
    folder = Path.cwd() if folder is None else folder
    if file is None and (folder / DEFAULT_FILE).exists():
        file = folder / DEFAULT_FILE
    given: dict[str, Given] = {}
    if file is not None:
        tree = read_yaml(file)
        given.update(_from_file(tree, file))
    given.update(_from_environment(environ))
    for key, (flag, value) in (flags or {}).items():
        given[key] = Given(value, f"flag {flag}")
    if "both" in given and not ("prefill" in given or "decode" in given):
        for key in ("prefill", "decode"):
            given[key] = Given(0, "default when only 'both' is set")
    config = _validated(given)
    check_counts(config)
    check_connector(config)
    check_faults(config)
    check_store(config)
    check_front(config.router)
    model = given["model"]
    resolved = _resolve_model(config.model, folder if model.folder is None else model.folder)
    if resolved != config.model:
        config = config.model_copy(update={"model": resolved})
    return Loaded(config, {key: value.origin for key, value in given.items()})


def read_yaml(file: Path) -> dict[Any, Any]:
    """The mapping in ``file``; ConfigError in one sentence for anything else."""
    try:
        with file.open("rb") as stream:
            raw = stream.read(limits.CONFIG_FILE_BYTES_MAX + 1)
    except FileNotFoundError:
        raise ConfigError(f"there is no file {file}") from None
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error
    if len(raw) > limits.CONFIG_FILE_BYTES_MAX:
        raise ConfigError(f"{file} is larger than {limits.CONFIG_FILE_BYTES_MAX} bytes; is it the right file?")
    try:
        tree = yaml.safe_load(raw.decode())
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 text (byte {error.start})") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{file}{where}: not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ConfigError(f"{file}: not valid YAML: nested too deeply") from error
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        # PyYAML's constructors let these out for values such as 2026-99-99, !!int x or !!timestamp x.
        raise ConfigError(f"{file}: not valid YAML: a value does not fit its type ({error})") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{file} must hold a mapping such as 'model: ./my-model', found {found(tree)}")
    return tree


def known_keys(part: type[Part] = FleetConfig, prefix: str = "") -> Iterator[str]:
    """Every dotted key, in the order of the tree."""
    for name, field in part.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Part):
            yield from known_keys(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def looks_like_path(model: str, folder: Path) -> bool:
    """Whether ``model`` means a folder rather than a name on Hugging Face."""
    return model.startswith(("/", ".", "~")) or (folder / model).exists()


def _resolve_model(model: str, folder: Path) -> str:
    if not looks_like_path(model, folder):
        return model
    return os.path.normpath(folder.absolute() / Path(os.path.expanduser(model)))


def _from_file(tree: dict[Any, Any], file: Path) -> dict[str, Given]:
    given = {}
    for key, value in _leaves(tree, FleetConfig, "", file.name):
        given[key] = Given(value, file.name, file.absolute().parent)
    return given


def _leaves(tree: dict[Any, Any], part: type[Part], prefix: str, file: str) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        field = part.model_fields.get(name) if isinstance(name, str) else None
        if field is None:
            known = [*known_keys(), *(prefix + other for other in part.model_fields)]
            raise ConfigError(f"unknown key '{key}' in {file}{_suggestion(key, known)}")
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Part):
            if not isinstance(value, dict):
                raise ConfigError(f"{key} in {file}: expected a mapping, found {found(value)}")
            yield from _leaves(value, inner, f"{key}.", file)
        elif key == "env":
            if not isinstance(value, dict):
                raise ConfigError(f"env in {file}: expected a mapping, found {found(value)}")
            for variable, text in value.items():
                yield f"env.{variable}", text
        else:
            yield key, value


def _suggestion(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not near:  # the right word at the wrong level: 'port' for 'router.port'
        last = key.rpartition(".")[2]
        near = [other for other in known if other.rpartition(".")[2] == last][:1]
    return f"; did you mean '{near[0]}'?" if near else ""


def _from_environment(environ: Mapping[str, str]) -> dict[str, Given]:
    variables = {ENVIRONMENT_PREFIX + key.upper().replace(".", "__"): key for key in known_keys()}
    given: dict[str, Given] = {}
    for variable in sorted(environ):
        if not variable.startswith(ENVIRONMENT_PREFIX):
            continue
        key = variables.get(variable)
        if key is None:
            hint = _suggestion(variable, list(variables))
            raise ConfigError(
                f"unknown environment variable {variable}{hint} (all that begin with FLEET_ are settings)"
            )
        origin = f"environment variable {variable}"
        value = _parse(key, environ[variable], origin)
        if key == "env":
            if not isinstance(value, dict):
                raise ConfigError(f"env in {origin}: expected a mapping, found {found(value)}")
            given.update({f"env.{name}": Given(text, origin) for name, text in value.items()})
        else:
            given[key] = Given(value, origin)
    return given


def _parse(key: str, text: str, origin: str) -> Any:
    """The value in an environment variable: JSON for lists and mappings, else the number or the text itself."""
    default = _default(key)
    if isinstance(default, tuple | dict):
        example = '["tcp"]' if isinstance(default, tuple) else '{"HF_TOKEN": "..."}'
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{key} in {origin}: expected JSON such as {example}, found {found(text)}") from error
    if isinstance(default, int | float):
        try:
            return type(default)(text)
        except ValueError:
            return text  # validation says what was expected
    return text


def _default(key: str) -> Any:
    part: type[Part] = FleetConfig
    *parents, name = key.split(".")
    for parent in parents:
        inner = part.model_fields[parent].annotation
        assert isinstance(inner, type)
        assert issubclass(inner, Part)
        part = inner
    return part.model_fields[name].get_default(call_default_factory=True)


def _validated(given: Mapping[str, Given]) -> FleetConfig:
    tree: dict[str, Any] = {}
    for key, one in given.items():
        *parents, name = key.split(".", 1) if key.startswith("env.") else key.split(".")
        part = tree
        for parent in parents:
            part = part.setdefault(parent, {})
        part[name] = one.value
    if "model" not in tree:
        raise ConfigError("model is not set; give --model FOLDER, or 'model: FOLDER' in fleet.yaml")
    for key, one in given.items():
        _check_plain(key, one)
    try:
        # Through JSON, where strict means "no text for numbers" but still takes a list for a tuple.
        return FleetConfig.model_validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        loc = ".".join(str(step) for step in first["loc"])
        origin = next((given[key].origin for key in _prefixes(loc) if key in given), "default")
        raise ConfigError(sentence(loc, origin, dict(first))) from error


def _prefixes(key: str) -> Iterator[str]:
    while key:
        yield key
        key = key.rpartition(".")[0]


def _check_plain(key: str, one: Given) -> None:
    """Refuse what JSON cannot say, such as YAML's dates, before it is turned into something else."""
    where = f"{key} in {one.origin}"
    rest, seen = [one.value], 0
    while rest:
        value, seen = rest.pop(), seen + 1
        if seen > limits.CONFIG_VALUES_MAX:  # an alias of YAML can stand for billions of values
            raise ConfigError(f"{where}: more than {limits.CONFIG_VALUES_MAX} values")
        if isinstance(value, dict):
            rest += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple):
            rest += value
        elif isinstance(value, str):
            if not value.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in value):
                raise ConfigError(f"{where}: holds bytes that are not UTF-8 text")
        elif isinstance(value, int) and abs(value) >= 1 << 63:
            raise ConfigError(f"{where}: the number is too large")
        elif value is not None and not isinstance(value, int | float):
            raise ConfigError(f"{where}: found {found(value)}; put it in quotes if it is meant as text")
