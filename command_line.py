"""Options from the command line and from `--config FILE.yaml|json`; flags win; all faults are reported at once."""

from __future__ import annotations

import argparse
import difflib
import json
import re
import reprlib
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from config import GROUPS, Settings
from contradictions import contradictions
from presets import with_preset
from utils import ConfigError

MISSING = object()
"""What stands for the value of a flag that has none."""


def parse_settings(argv: Sequence[str] | None = None, *, description: str | None = None, **defaults: Any) -> Settings:
    """Settings from `argv` (the process's own if None) over a script's own `defaults` over `--config`.

    Raises:
        ConfigError: every unknown or wrong option and every contradiction, in one message.
        SystemExit: `--help`.
    """
    given, unknown = _parser(description, defaults).parse_known_args(argv)
    flags = {name: value for name, value in vars(given).items() if value is not None}
    missing = [name for name, value in flags.items() if value in (MISSING, [], "") or "" in list(value)]  # of paths
    faults = [f"--{name}: its value is missing" for name in missing]
    flags = {name: value for name, value in flags.items() if name not in missing}
    config_path = flags.pop("config", None)
    faults += [_unknown(word) for word in unknown if word.startswith("--")]
    faults += [f"{word!r} belongs to no option" for word in unknown if not word.startswith("--")][: not faults]
    file_values: dict[str, Any] = {}
    is_whole = True
    try:
        file_values = _read_config_file(Path(config_path).expanduser()) if config_path else {}
    except ConfigError as error:
        faults.append(str(error))
        is_whole = False
    for key in sorted(set(file_values) - set(Settings.model_fields)):
        del file_values[key]
        faults.append(f"{config_path}: {_unknown(key)}")
    truths = [key for key, value in file_values.items() if isinstance(value, bool)]
    for key in truths:
        if Settings.model_fields[key].annotation is not bool:
            faults.append(f"{config_path}: {key}: {str(file_values.pop(key)).lower()} is no value of this option")
    file_values = {name: value for name, value in file_values.items() if name not in defaults}
    values = {**file_values, **defaults, **flags}
    values = {name: None if value in ("none", "None") and _optional(name) else value for name, value in values.items()}
    return _validate(values, {*file_values, *flags}, faults, is_whole=is_whole)


def _validate(values: dict[str, Any], said: set[str], faults: list[str], *, is_whole: bool) -> Settings:
    wrong: set[str] = set()
    try:
        settings = Settings(**values)
    except ValidationError as error:
        wrong = {str(fault["loc"][0]) for fault in error.errors()}
        faults += map(_say, error.errors())
        settings = Settings(**{name: value for name, value in values.items() if name not in wrong})
    settings, refused = with_preset(settings)
    if is_whole and "mode" not in wrong:  # which most of them are about
        faults += [*refused, *contradictions(settings, said - wrong)]
    if faults:
        raise ConfigError("wrong options:\n" + "\n".join(f"  {fault}" for fault in dict.fromkeys(faults)))
    return settings


def _say(fault: ErrorDetails) -> str:
    name, value, message = str(fault["loc"][0]), fault["input"], fault["msg"]
    # aliases of YAML can nest without end
    shown = reprlib.repr(value)[:100] if isinstance(value, (list, dict)) else value
    if fault["type"] == "string_pattern_mismatch":
        message = f"must look like {' or '.join(Settings.model_fields[name].examples or [])}"
    return f"--{name} {shown}: {message[0].lower()}{message[1:]}"


def _unknown(word: str) -> str:
    name = word.lstrip("-").split("=")[0]
    close = difflib.get_close_matches(name, Settings.model_fields, n=1)
    return f"unknown option {word}" + (f"; did you mean --{close[0]}?" if close else "; --help lists all options")


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        if twice := _repeated([key.value for key, _ in node.value]):
            raise yaml.constructor.ConstructorError(None, None, twice, node.start_mark)
        return super().construct_mapping(node, deep)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError for a key that stands twice."""
    if twice := _repeated([name for name, _ in pairs]):
        raise ValueError(twice)
    return dict(pairs)


def _repeated(names: Sequence[Any]) -> str | None:
    return next((f"{name!r} stands there twice" for name in names if names.count(name) > 1), None)


def _read_config_file(path: Path) -> dict[str, Any]:
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise ConfigError(f"--config {path}: a .yaml or .json file is needed")
    try:
        text = path.read_text(encoding="utf-8-sig")  # Notepad writes a mark in front
        values = json.loads(text, object_pairs_hook=_object) if path.suffix == ".json" else yaml.load(text, _Loader)
    except OSError as error:
        raise ConfigError(f"--config {path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path}: is no valid {path.suffix[1:]}: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path}: must hold one mapping of option to value")
    return {str(key): value for key, value in values.items()}


def _parser(description: str | None, defaults: Mapping[str, Any]) -> argparse.ArgumentParser:
    """Flags as plain strings, so that the command line and the file go through the same checks."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]",
        description=description,
        allow_abbrev=False,
        formatter_class=_HelpFormatter,
    )
    # before Python 3.14 it takes -1e-3 for an option
    parser._negative_number_matcher = re.compile(r"-\.?\d")
    parser.add_argument(
        "--config",
        nargs="?",
        const=MISSING,
        metavar="FILE",
        help="options from a .yaml or .json file; flags win over it",
    )
    for group in GROUPS:
        section = parser.add_argument_group(group.__doc__)
        for name, field in group.__annotations__.items():
            info = group.model_fields[name]
            help_text = _help(info, defaults.get(name, info.default))
            section.add_argument(f"--{name}", help=help_text, metavar=_metavar(field, info), **_arity(field, info))
    return parser


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows values as needed that argparse lets be missing, so that this is told with all other faults."""

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        shown = super()._format_args(action, default_metavar)
        if action.const is MISSING:
            return shown.strip("[]")
        return f"{action.metavar} {shown}" if action.nargs == "*" else shown


def _arity(annotation: str, info: FieldInfo) -> dict[str, Any]:
    if annotation.startswith("Paths"):
        return {"nargs": "*", "action": "extend"}
    return {"nargs": "?", "const": "True" if info.annotation is bool else MISSING}


def _choices(info: FieldInfo) -> list[str]:
    members = [info.annotation, *get_args(info.annotation)]
    return [
        str(choice)
        for member in members
        if getattr(member, "__origin__", None) is Literal
        for choice in get_args(member)
    ]


def _metavar(annotation: str, info: FieldInfo) -> str:
    if _choices(info):
        return "/".join(_choices(info))
    if info.annotation is bool:
        return "True/False"
    if annotation.startswith(("Paths", "Place")):
        return "PATH"
    names = str(info.annotation)
    return "INT" if "int" in names else "NUMBER" if "float" in names else "TEXT"


def _help(info: FieldInfo, default: Any) -> str:
    value = " ".join(default) if isinstance(default, tuple) else default
    shown = "" if default is None else f" (default: {value})"
    return f"{info.description}{shown}".replace("%", "%%")


def _optional(name: str) -> bool:
    return name in Settings.model_fields and Settings.model_fields[name].default is None
