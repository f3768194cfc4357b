"""What the repository says of itself holds."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from storage_schemas.command_line import Command, parse

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def commands_in(text: str) -> list[tuple[str, list[str]]]:
    """(program, words) of every `python -m pipeline|trainer ...` line in fenced code."""
    found = []
    for block in re.findall(r"```(?:bash|sh)?\n(.*?)```", text, flags=re.DOTALL):
        joined = re.sub(r"\\\n\s*", " ", block)
        for line in joined.splitlines():
            match = re.match(r"\s*(?:torchrun\s.*-m|python -m)\s+(pipeline|trainer)\s+(.*)", line.split("  #")[0])
            if match:
                found.append((match[1], match[2].split()))
    return found


def test_every_command_of_the_readme_parses():
    from pipeline.__main__ import COMMANDS
    from trainer.__main__ import commands as trainer_commands

    programs: dict[str, dict[str, Command]] = {"pipeline": COMMANDS, "trainer": trainer_commands(None)}
    commands = commands_in(README)
    assert len(commands) >= 6
    for program, (command, *words) in commands:
        if "--help" not in words:
            parse(programs[program][command].config, words, program=program)


def test_files_that_the_readme_names_exist():
    for path in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("package", ["diffusion", "storage_schemas", "trainer", "trainer.stream", "trainer.fit"])
def test_the_trainer_needs_no_ray(package):
    """With ray and the pipeline not to be had, everything that a trainer imports still imports."""
    program = f"import sys\nfor name in ('ray', 'pipeline'): sys.modules[name] = None\nimport {package}\n"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_importing_the_pipeline_does_not_import_ray():
    program = "import sys, pipeline.__main__; sys.exit('ray' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
