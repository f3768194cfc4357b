"""One way to configure both programs: a frozen pydantic model whose every field is a flag and a YAML key.

    main({"fit": Command("limbeck.trainer.fit", "FitConfig", "run_fit"), ...})

`--config FILE.yaml` holds the same fields nested as YAML; a flag on the command line wins over the file. A refused
value is one line on stderr and exit code 2; `--debug` shows the traceback instead.
"""

import contextlib
import io
import itertools
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any, TypeVar
from unittest import mock

import tyro
import yaml
from pydantic import BaseModel, ConfigDict

from limbeck.storage_schemas.errors import UsageError, UserError, shown, without_credentials
from limbeck.storage_schemas.log import log_to_stderr
from limbeck.storage_schemas.places import local_path


class _PassedOn:
    """Marks the field whose words are another program's options."""


PassedOn = Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], _PassedOn()]
"""Another program's options: --fit.steps 100, or in YAML fit: {steps: 100}, is the words --steps 100 of field `fit`."""

GroupT = TypeVar("GroupT")
Unprefixed = Annotated[GroupT, tyro.conf.OmitArgPrefixes]
"""A group of options whose flags and YAML keys are the options' own names: --steps, not --optimization.steps."""


class Config(BaseModel):
    """A typed, frozen group of options that is valid by construction."""

    model_config = ConfigDict(frozen=True, extra="forbid")


ConfigT = TypeVar("ConfigT", bound=Config)


@dataclass(frozen=True)
class Command:
    """One word of the command line: a module, which is imported when the command is asked for, and two names in it."""

    module: str
    options: str
    function: str

    @property
    def config(self) -> type[Config]:
        options: type[Config] = getattr(import_module(self.module), self.options)
        return options

    @property
    def run(self) -> Callable[[Any], int]:
        """Takes the options and returns the exit code."""
        function: Callable[[Any], int] = getattr(import_module(self.module), self.function)
        return function

    @property
    def summary(self) -> str:
        return (self.config.__doc__ or "").strip().splitlines()[0]


def main(commands: Mapping[str, Command], arguments: Sequence[str]) -> int:
    """Run the command that `arguments` name, and return its exit code."""
    log_to_stderr()
    words = list(arguments)
    own = _before_dashes(words)
    debug = "--debug" in own
    words = [word for word in own if word != "--debug"] + words[len(own) :]
    try:
        if not words or words[0] in ("-h", "--help"):
            print(_overview(commands))
            return 0 if words else 2
        if words[0] == "--version":
            print(f"limbeck {_version()}")
            return 0
        command = commands.get(words[0])
        if command is None:
            raise UsageError(f"{words[0]!r} is no command of limbeck: use one of {', '.join(commands)}")
        return command.run(parse(command.config, words[1:], program=f"limbeck {words[0]}"))
    except (UserError, ValueError, OSError) as error:
        if debug:
            raise
        message = str(error) if isinstance(error, UserError) else f"{error} (--debug shows where)"
        print(f"limbeck: {shown(without_credentials(' '.join(message.split())))}", file=sys.stderr)
        return error.exit_code if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        return 130


def parse(config: type[ConfigT], arguments: Sequence[str], *, program: str) -> ConfigT:
    """The config that flags and `--config FILE.yaml` describe. Raises UsageError in one line."""
    flags = spelled_out(config, arguments)
    if {"-h", "--help"} & set(_before_dashes(flags)):
        return tyro.cli(config, args=flags, prog=program, description=_help(config))
    complaint = io.StringIO()
    # A wide terminal keeps each sentence of tyro's boxes on one line, so that an error can repeat them in one.
    with mock.patch.dict(os.environ, {"COLUMNS": "4000"}), contextlib.redirect_stderr(complaint):
        try:
            return tyro.cli(config, args=flags, prog=program)
        except SystemExit:
            pass
    problem = without_credentials(_one_line(complaint.getvalue(), _renamed(config)))
    raise UsageError(f"{problem}; {program} --help lists every option")


def spelled_out(config: type[Config], arguments: Sequence[str]) -> list[str]:
    """The same words with the fields of `--config FILE.yaml` in its place. What follows `--` is left as it is."""
    own = _before_dashes(arguments)
    words = _with_yaml(own, _positionals(config))
    for name, field in config.model_fields.items():
        if any(isinstance(mark, _PassedOn) for mark in field.metadata):
            words = _passed_on(words, f"--{name}")
    return [*words, *arguments[len(own) :]]


def ungrouped(config: type[Config], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as a user writes them: the options of unprefixed groups beside the others."""
    flat = dict[str, Any]()
    for name, value in settings.items():
        flat |= dict(value) if name in _unprefixed(config) and isinstance(value, Mapping | Config) else {name: value}
    return flat


def grouped(config: type[Config], flat: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as a config takes them: every option of an unprefixed group in its group."""
    owner = {option: name for name, group in _unprefixed(config).items() for option in group.model_fields}
    settings = dict[str, Any]()
    for name, value in flat.items():
        if name in owner:
            settings.setdefault(owner[name], {})[name] = value
        else:
            settings[name] = value
    return settings


def _unprefixed(config: type[Config]) -> dict[str, Any]:
    fields = config.model_fields.items()
    return {name: field.annotation for name, field in fields if tyro.conf.OmitArgPrefixes in field.metadata}


def _passed_on(words: Sequence[str], field: str) -> list[str]:
    """--fit.steps 100 as --fit=--steps --fit=100: a flag of another program, and what follows it up to the next."""
    found, inside = list[str](), False
    for word in words:
        if word.startswith("--"):
            inside = word.startswith(f"{field}.")
            word = f"--{word.removeprefix(f'{field}.')}" if inside else word
        found.append(f"{field}={word}" if inside else word)
    return found


def _before_dashes(arguments: Sequence[str]) -> list[str]:
    return list(itertools.takewhile(lambda word: word != "--", arguments))


def _version() -> str:
    try:
        return version("limbeck")
    except PackageNotFoundError:
        raise UsageError(
            "limbeck is not installed here, it runs from its source: pip install it to see a version"
        ) from None


def _overview(commands: Mapping[str, Command]) -> str:
    width = max(map(len, commands))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in commands.items()]
    return "\n".join(["usage: limbeck COMMAND [OPTIONS]", "", *lines, "", "COMMAND --help lists options."])


def _help(config: type[Config]) -> str:
    return f"{(config.__doc__ or '').strip()}\n\n--config FILE.yaml reads the same fields from YAML; flags win over it."


def _positionals(config: type[Config]) -> set[str]:
    """Fields that the command line gives by place: they have no flag."""
    return {name for name, field in config.model_fields.items() if tyro.conf.Positional in field.metadata}


def _renamed(config: type[Config]) -> dict[str, str]:
    """Fields whose flag has another name; "" for a group whose name no flag bears."""
    marks = [(name, mark) for name, field in config.model_fields.items() for mark in field.metadata]
    renamed = {name: mark.name for name, mark in marks if getattr(mark, "name", None)}
    return renamed | dict.fromkeys(_unprefixed(config), "")


def _with_yaml(arguments: list[str], positionals: set[str]) -> list[str]:
    """Replace `--config FILE` by the file's fields as flags, leaving out those that the command line sets itself."""
    where = next((i for i, word in enumerate(arguments) if word.split("=")[0] == "--config"), None)
    if where is None:
        return arguments
    path = arguments[where].partition("=")[2] or "".join(arguments[where + 1 : where + 2])
    rest = arguments[:where] + arguments[where + (1 if "=" in arguments[where] else 2) :]
    given = {_flag_name(word) for word in rest if word.startswith("--")}
    document = _read_yaml(path)
    by_place = [document.pop(name) for name in sorted(positionals & document.keys())]
    places = [str(value) for values in by_place for value in (values if isinstance(values, list) else [values])]
    named = [word for name, words in _flags_of(document) if name not in given for word in words]
    # A place may be filled on the command line alone, which then begins with a word and not with a flag.
    return (rest if rest and not rest[0].startswith("-") else places + rest) + named


def _flag_name(word: str) -> str:
    name = word.split("=")[0].removeprefix("--").replace("_", "-")
    *groups, last = name.split(".")
    return ".".join([*groups, last.removeprefix("no-")])


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        with open(local_path(path), encoding="utf-8") as file:
            document = yaml.safe_load(file) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"--config {path}: {error}; name a readable YAML file") from error
    if not isinstance(document, dict):
        raise UsageError(f"--config {path}: holds a {type(document).__name__}; write field: value lines")
    return document


def _flags_of(document: dict[str, Any], prefix: str = "") -> list[tuple[str, list[str]]]:
    """Nested YAML as [(flag name, its words)]: {solver: {name: heun}} -> --solver.name heun."""
    flags: list[tuple[str, list[str]]] = []
    for key, value in document.items():
        name = f"{prefix}{key}".replace("_", "-")
        if isinstance(value, dict):
            flags += _flags_of(value, prefix=f"{name}.")
        elif isinstance(value, bool):
            group, _, last = name.rpartition(".")
            flags.append((name, [f"--{name}" if value else f"--{group}{'.' if group else ''}no-{last}"]))
        elif isinstance(value, list):
            flags.append((name, [f"--{name}", *map(str, value)]))
        else:
            flags.append((name, [f"--{name}={value}"]))
    return flags


def _one_line(complaint: str, renamed: Mapping[str, str]) -> str:
    """Tyro's box as one sentence: what is wrong and, where it knows, what was perhaps meant."""
    lines = [line.strip("│ \n") for line in complaint.splitlines()]
    lines = [line for line in lines if line and not line.startswith(("╭", "╰", "For full helptext", "For further"))]
    if len(lines) > 1 and set(lines[1]) == {"-"}:
        lines = lines[2:]  # where stdout has no UTF-8 a box is its title, underlined
    said = [line for line in lines if not set(line) <= {"─", "-"}]
    stop = next((i for i, line in enumerate(said) if line.startswith("Argument helptext")), len(said))
    said = said[:stop] or ["these options do not parse"]
    heading = re.fullmatch(r"Error parsing (\S+): \d+ validation errors? for \S+", said[0])
    return _refused(said[1:], heading[1], renamed) if heading else " ".join(said)


def _refused(lines: Sequence[str], what: str, renamed: Mapping[str, str]) -> str:
    """Pydantic's lines, a field's name before each complaint, as `--solver.steps: should be greater than 0, got 0`."""
    # A group of options, else the whole configuration.
    prefix = "" if what[0].isupper() or not renamed.get(what, what) else f"{what}."
    said: list[str] = []
    flag = ""
    for line in lines:
        field = re.fullmatch(r"([a-z][a-z_0-9]*)(?:\.(\S+))?", line)
        if field:
            name = renamed.get(field[1], field[1]) or field[2]
            flag = f"--{prefix}{name}: ".replace("_", "-") if name else ""
            continue
        line = re.sub(r" \[type=value_error, .*\]$", "", line)
        line = re.sub(r" \[type=\w+, input_value=(.*?), input_type=\w+\]", r", got \1", line)
        said.append(flag + re.sub(r"^(Value error, |Input (?=should)|String (?=should))", "", line))
    return "; ".join(said)
