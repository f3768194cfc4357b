"""A run's checkpoints: whole or not there. A folder is written beside its place, flushed, and renamed."""

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch

from storage_schemas.errors import StoreError

_STATE = "state.pt"
_PREFIX = "step-"


def save(run: Path, step: int, state: dict[str, Any], *, keep_last: int) -> None:
    """`state`, a tree of plain values and tensors, as checkpoint `step`; older ones than the last few are removed."""
    folder = run / "checkpoints"
    target = folder / f"{_PREFIX}{step:08d}"
    temporary = folder / f".{target.name}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    with open(temporary / _STATE, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    if target.exists():
        shutil.rmtree(target)
    os.rename(temporary, target)
    _flush(folder)
    _tidy(folder, keep_last)


def load_last(run: Path, *, device: torch.device) -> dict[str, Any] | None:
    """The newest checkpoint's state, None where there is none."""
    steps = _steps(run / "checkpoints")
    if not steps:
        return None
    path = run / "checkpoints" / f"{_PREFIX}{steps[-1]:08d}" / _STATE
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise StoreError(
            f"{path} is damaged: remove its folder to go on from the checkpoint before, or start anew by --no-resume"
        ) from error
    return state


def _steps(folder: Path) -> list[int]:
    names = [path.name.removeprefix(_PREFIX) for path in folder.glob(f"{_PREFIX}*")]
    return sorted(int(name) for name in names if name.isdecimal())


def _tidy(folder: Path, keep_last: int) -> None:
    """Remove old checkpoints, and what a killed writer left."""
    for step in _steps(folder)[:-keep_last]:
        shutil.rmtree(folder / f"{_PREFIX}{step:08d}")
    for left in folder.glob(f".{_PREFIX}*"):
        shutil.rmtree(left, ignore_errors=True)


def _flush(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
