"""How the process of a worker ended, in words that a failure record keeps."""

import signal
from typing import Literal

Cause = Literal["process", "node", "notice"]
"""What went with a worker: its process alone, its whole node, or a node that had been given notice."""

OUT_OF_MEMORY_HINT = "perhaps out of memory: see the machine's kernel log"


def exit_reason(exit_code: int | None) -> str:
    """-9 -> exit code -9, SIGKILL (perhaps out of memory: see the machine's kernel log)."""
    if exit_code is None or exit_code >= 0:
        return f"exit code {exit_code}"
    name = _signal_name(-exit_code)
    return f"exit code {exit_code}, {name}" + (f" ({OUT_OF_MEMORY_HINT})" if name == "SIGKILL" else "")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
