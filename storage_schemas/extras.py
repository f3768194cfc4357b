"""Packages that only some commands need: where one is missing, the error says which extra of ours brings it."""

from importlib import import_module
from typing import Any

from limbeck.storage_schemas.errors import UsageError

EXTRAS = {"PIL": "trainer", "sklearn": "trainer", "torchmetrics": "trainer", "matplotlib": "trainer", "s3fs": "s3"}
_NAMES = {"PIL": "Pillow", "sklearn": "scikit-learn"}


def need(module: str, what: str, *, extra: str | None = None) -> Any:
    """The module. UsageError where it isn't installed: `what` needs it."""
    try:
        return import_module(module)
    except ImportError as error:
        package, top = module.partition(".")[0], (error.name or module).partition(".")[0]
        if top != package:  # it is there, but broken
            raise UsageError(f"{what} needs {_NAMES.get(package, package)}, which does not load: {error}") from None
        problem = f"{what} needs {_NAMES.get(package, package)}, which is not installed"
        raise UsageError(f"{problem}: pip install 'limbeck[{extra or EXTRAS[package]}]'") from None
