"""Errors that a user reads: one line with the value, the rule and the way out."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that do something to a terminal instead of being shown: escapes, line ends, what turns text around."""


class UserError(Exception):
    """Something only the user can change. Printed without a traceback; the program ends with `exit_code`."""

    exit_code = 1


class UsageError(UserError):
    """A command line or a configuration that cannot be meant."""

    exit_code = 2


class StoreError(UserError):
    """The store is not there, not ours, or does not keep its promises."""


class ManifestMismatch(UserError):
    """A dataset that cannot serve what is asked of it."""


class CorruptShard(UserError):
    """Bytes that do not match the checksum in their commit."""


@contextmanager
def usage_errors() -> Iterator[None]:
    """While a configuration becomes objects, a refused value is the user's to correct: ValueError -> UsageError."""
    try:
        yield
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        raise UsageError(str(error)) from error


def without_credentials(text: str) -> str:
    """The text with user:password@ of every uri in it hidden; a password may hold slashes."""
    return re.sub(r"(\w[\w+.-]*:/{1,2})(?:[^\s@/:]*:[^\s@]*|[^\s@/]*)@", r"\1***@", text)


def shown(text: object) -> str:
    """The text in one line, with each control character as its code: what a document says can't steer a terminal."""
    return CONTROLS.sub(lambda match: ascii(match[0])[1:-1], str(text))
