"""The commands of ours inside manifests, scripts and READMEs, parsed as our own command line parses them."""

import re
import shlex
from pathlib import Path

from pipeline.__main__ import COMMANDS
from storage_schemas.command_line import Command, parse
from tests.deploy.manifests import CONFIG, DEPLOY, KUBERNETES
from trainer.__main__ import commands

PROGRAMS: dict[str, dict[str, Command]] = {"pipeline": COMMANDS, "trainer": commands(None)}
MOUNTED = {"pipeline": CONFIG, "trainer": KUBERNETES / "trainer"}


def our_commands(text: str) -> list[tuple[str, list[str]]]:
    """(program, words) of every `-m pipeline ...` and `-m trainer ...` in shell text; what is expanded becomes `x`."""
    text = re.sub(r"\\\n\s*", " ", text)
    text = "\n".join(line.split("  #")[0] for line in text.splitlines() if not line.lstrip().startswith("#"))
    text = re.sub(r"\$\(\(.*?\)\)(?!\))|\$\([^)]*\)|\$\{[^}]*\}|\$\w+", "x", text)
    found = re.findall(r"-m (pipeline|trainer) ([^\"`;&|>\n]*)", text)
    return [(program, shlex.split(words.rstrip("'") if words.count("'") % 2 else words)) for program, words in found]


def parse_ours(program: str, words: list[str], *, mounted: Path | None = None) -> None:
    """Parse a command as our own command line does, with its --config file from where it really lies."""
    command, *options = [_local(word, mounted or MOUNTED[program]) for word in words]
    if options == ["--help"] or command == "--help":
        return
    parse(PROGRAMS[program][command].config, options, program=program)
    if "--" in options:  # what `submit` passes on is a command itself
        parse_ours(program, options[options.index("--") + 1 :], mounted=mounted)


def _local(word: str, mounted: Path) -> str:
    word = word.replace("/etc/limbeck/", f"{mounted}/").replace("~/limbeck/deploy/", f"{DEPLOY}/")
    return re.sub(r"^(--config=)?deploy/", rf"\1{DEPLOY}/", word)
