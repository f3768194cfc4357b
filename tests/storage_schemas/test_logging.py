"""What limbeck logs: bare lines on stderr in its commands, whatever a host program wants elsewhere."""

import os
import pty
import subprocess
import sys

HOST = """
import logging
from limbeck.pipeline.job.progress import Progress
from limbeck.storage_schemas.commit import Commit
from limbeck.storage_schemas.log import log
{set_up}
with Progress(3, interval=60) as progress:
    log.info("100% of\\x1b[2J [bold]it[/bold]")
    progress.count(Commit.model_construct(rows=128))
"""


def run(set_up: str, *, stderr: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    script = HOST.format(set_up=set_up)
    environment = os.environ | {"TERM": "xterm"}
    return subprocess.run([sys.executable, "-c", script], stderr=stderr, text=True, check=True, env=environment)


def test_a_host_program_hears_nothing_that_it_did_not_ask_for():
    assert run("").stderr == ""


def test_a_host_program_takes_the_lines_where_it_wants_them():
    assert run("logging.basicConfig(level='INFO', format='%(name)s: %(message)s')").stderr == (
        "limbeck: 100% of\x1b[2J [bold]it[/bold]\n"
    )


def test_a_command_writes_bare_lines_without_control_characters():
    ours = "from limbeck.storage_schemas.log import log_to_stderr; log_to_stderr(); log_to_stderr()"
    assert run(ours).stderr == "100% of\\x1b[2J [bold]it[/bold]\n"


def test_a_bar_on_a_terminal_stays_whole_where_a_line_is_logged():
    ours, theirs = pty.openpty()
    run("from limbeck.storage_schemas.log import log_to_stderr; log_to_stderr()", stderr=theirs)
    os.close(theirs)
    seen = ""
    while True:
        try:
            seen += os.read(ours, 1 << 16).decode()
        except OSError:
            break
    os.close(ours)
    rows = [row.rpartition("\x1b[2K")[2] for row in seen.split("\r\n")]
    assert "100% of\\x1b[2J [bold]it[/bold]" in rows, "a row of its own"
    assert sum("solving" in row for row in rows[1:]) >= 1, "the bar goes on below it"
    assert not any("solving" in row and "[bold]" in row for row in rows)
