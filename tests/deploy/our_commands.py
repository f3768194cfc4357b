"""The commands of ours inside manifests, scripts and READMEs, parsed as our own command line parses them."""

import re
import shlex
from pathlib import Path

from limbeck.storage_schemas.command_line import parse
from limbeck.storage_schemas.program import COMMANDS
from tests.deploy.manifests import CONFIG, DEPLOY, KUBERNETES


def our_commands(text: str) -> list[list[str]]:
    """The words behind every `limbeck`, `-m limbeck.pipeline` and `-m limbeck.trainer` in shell text.

    What the shell expands becomes `x`.
    """
    text = re.sub(r"\\\n\s*", " ", text)
    text = "\n".join(line.split("  #")[0] for line in text.splitlines() if not line.lstrip().startswith("#"))
    text = re.sub(r"\$\(\(.*?\)\)(?!\))|\$\([^)]*\)|\$\{[^}]*\}|\$\w+", "x", text)
    ours = r"-m limbeck\.(?:pipeline|trainer)|(?:^|['\"])limbeck"
    found = re.findall(rf"(?:{ours}) ([^\"`;&|>\n]*)", text, re.MULTILINE)
    return [shlex.split(words.rstrip("'") if words.count("'") % 2 else words) for words in found]


def parse_ours(words: list[str], *, mounted: Path | None = None) -> None:
    """Parse a command as our own command line does, with its --config file from where it really lies."""
    command, *options = [_local(word, mounted or _mounted(words[0])) for word in words]
    if options == ["--help"] or command == "--help":
        return
    parse(COMMANDS[command].config, options, program=command)
    if "--" in options:  # what `submit` passes on is a command itself
        parse_ours(options[options.index("--") + 1 :], mounted=mounted)


def _mounted(command: str) -> Path:
    return KUBERNETES / "trainer" if command == "fit" else CONFIG


def _local(word: str, mounted: Path) -> str:
    word = word.replace("/etc/limbeck/", f"{mounted}/").replace("~/limbeck/deploy/", f"{DEPLOY}/")
    return re.sub(r"^(--config=)?deploy/", rf"\1{DEPLOY}/", word)
