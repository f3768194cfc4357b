"""An install without extras: help and refusals need no package of theirs, and what does says which one brings it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKED = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in "PIL sklearn matplotlib torchmetrics tensorboard s3fs diffusers ray".split():
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
sys.path.insert(0, {str(ROOT)!r})
from limbeck.storage_schemas.command_line import main
from limbeck.storage_schemas.program import COMMANDS
"""
EVERY_HELP = """
import contextlib, io
assert main(COMMANDS, ["--help"]) == 0
assert main(COMMANDS, ["fitt"]) == 2
for name in COMMANDS:
    with contextlib.redirect_stdout(io.StringIO()) as told, contextlib.suppress(SystemExit):
        main(COMMANDS, [name, "--help"])
    assert "--help" in told.getvalue(), name
"""
ONE = """
sys.exit(main(COMMANDS, sys.argv[1:]))
"""


def without_extras(code, *words, cwd):
    command = [sys.executable, "-c", BLOCKED + code, *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


def test_every_help_and_a_typing_error_need_no_extra(tmp_path):
    done = without_extras(EVERY_HELP, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("report e --out r", "a plot needs matplotlib, which is not installed: pip install 'limbeck[trainer]'"),
        ("evaluate r --data p", "pip install 'limbeck[trainer]'"),
        ("classifier --out c", "sklearn:digits needs scikit-learn, which is not installed: pip"),
        ("fit --out r --data s3://bucket/x", "s3:// needs s3fs, which is not installed: pip"),
        (
            "calibrate --teacher builtin:gaussian --picture a.png",
            "--picture needs matplotlib, which is not installed: pip install 'limbeck[pipeline]'",
        ),
        ("generate --teacher builtin:gaussian --count 8 --store s", "pip install 'limbeck[pipeline]', or use"),
    ],
)
def test_a_command_whose_extra_is_missing_says_so_in_one_line(line, told, tmp_path):
    done = without_extras(ONE, *line.split(), cwd=tmp_path)
    assert (done.returncode, told in done.stderr.splitlines()[-1], "Traceback" in done.stderr) == (2, True, False)
