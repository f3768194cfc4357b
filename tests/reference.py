"""The README's tables of options and objectives, made from the code: `python -m tests.reference` rewrites them."""

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import tyro
from pydantic.fields import FieldInfo

from limbeck.diffusion.models.schedulers import SCHEDULERS
from limbeck.storage_schemas.command_line import Command, Config
from limbeck.storage_schemas.program import COMMANDS
from limbeck.trainer.objectives.table import OBJECTIVES

README = Path(__file__).parents[1] / "README.md"
TEACHERS = README.parent / "docs" / "teachers.md"


def reference() -> str:
    """One table for each command of both programs. A command that has all of another's options lists only its own."""
    tables = []
    for name, command in COMMANDS.items():
        base = next((one for one in COMMANDS if _extends(command.config, COMMANDS[one].config)), None)
        tables.append(_table(f"limbeck {name}", command, base, COMMANDS[base].config if base else None))
    return "\n".join(tables)


def _extends(config: type[Config], other: type[Config]) -> bool:
    return config is not other and issubclass(config, other)


def objectives() -> str:
    """One row for each objective, of what its own file says of it."""
    rows = [f"| `{name}` | {kind.learns} | {kind.reads} | {kind.samples} |" for name, kind in OBJECTIVES.items()]
    head = ["| objective | the student learns | reads | samples by |", "| --- | --- | --- | --- |"]
    return "\n".join([*head, *rows, ""])


def schedulers() -> str:
    """A row for the schedulers that are read and compared alike."""
    rows: dict[tuple[str, str], list[str]] = {}
    for name, kind in SCHEDULERS.items():
        rivals = ", ".join(f"{rival} ({solver})" for solver, (rival, _) in kind.rivals.items())
        rows.setdefault((kind.reads, rivals or "none: its own steps are stochastic"), []).append(name)
    head = ["| scheduler | is read as | compared with, by solver |", "| --- | --- | --- |"]
    return "\n".join(
        [*head, *(f"| {', '.join(names)} | {reads} | {rivals} |" for (reads, rivals), names in rows.items()), ""]
    )


TABLES = {"options": reference, "objectives": objectives, "schedulers": schedulers}


def with_reference(page: str) -> str:
    """A page with the tables that it has made again."""
    for name, table in TABLES.items():
        begin, end = f"<!-- {name}: made by tests/reference.py -->\n", f"<!-- end of {name} -->\n"
        if begin in page:
            before, _, rest = page.partition(begin)
            _, _, after = rest.partition(end)
            page = f"{before}{begin}\n{table()}\n{end}{after}"
    return page


def _table(words: str, command: Command, base: str | None, inherited: type[Config] | None) -> str:
    known = dict.fromkeys(option_rows(inherited)) if inherited else {}
    rows = [
        f"| `{flag}` | {default} | {help} |"
        for flag, default, help in option_rows(command.config)
        if (flag, default, help) not in known
    ]
    more = f" All options of `{base}`, and:" if base else ""
    head = ["| option | default | |", "| --- | --- | --- |"]
    return "\n".join([f"**`{words}`** {command.summary}{more}\n", *head, *rows, ""])


def option_rows(config: type[Config], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    for name, field in config.model_fields.items():
        group = next((kind for kind in (field.annotation, *get_args(field.annotation)) if _is_config(kind)), None)
        if group is not None:
            yield from option_rows(group, prefix if tyro.conf.OmitArgPrefixes in field.metadata else f"{prefix}{name}.")
        else:
            yield _flag(prefix + name, field), _default(field), (field.description or "").replace("|", "/")


def _is_config(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, Config)


def _flag(name: str, field: FieldInfo) -> str:
    if any("Positional" in str(mark) or "POSITIONAL" in str(mark) for mark in field.metadata):
        return name.upper()
    renamed = next((mark.name for mark in field.metadata if getattr(mark, "name", None)), name)
    return f"--{renamed.replace('_', '-')}"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if isinstance(field.default, bool):
        return "on" if field.default else "off"
    if isinstance(field.default, tuple):
        return " ".join(map(str, field.default))
    return "" if field.default is None else f"{field.default}"


if __name__ == "__main__":
    for path in (README, TEACHERS):
        path.write_text(with_reference(path.read_text()))
