"""What limbeck says on its way: one logger, which a program that imports limbeck takes where it wants."""

import logging
import sys

from limbeck.storage_schemas.errors import shown

log = logging.getLogger("limbeck")


class _Lines(logging.Handler):
    """Writes each message in one line to what is sys.stderr at that time: while a bar of rich's runs, that is its."""

    def emit(self, record: logging.LogRecord) -> None:
        print(shown(record.getMessage()), file=sys.stderr, flush=True)


_LINES = _Lines()


def log_to_stderr() -> None:
    """Have what limbeck logs come as bare lines on stderr, as in its commands."""
    log.setLevel(logging.INFO)
    log.propagate = False  # absl, which TensorBoard imports, has a handler of its own on the root
    log.addHandler(_LINES)
