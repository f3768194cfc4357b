"""The one place where a device's name becomes a device."""

import torch

from limbeck.storage_schemas.errors import UsageError


def pick_device(name: str) -> torch.device:
    """The device of a name; auto is the first GPU, or the CPU. Raises UsageError for one that this machine lacks.

    A GPU gets no context by that: a driver that only asks takes none of its memory.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type != "cuda" or (device.index or 0) >= torch.cuda.device_count():
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name}: {str(error).splitlines()[0]}; use auto or cpu") from error
    return device
