"""The one place where a device's name becomes a device."""

import torch


def pick_device(name: str) -> torch.device:
    """The device of a name; auto is the first GPU where there is one. ValueError for one that is not here.

    A GPU that is there gets no context by that: a driver that only asks takes none of its memory.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type != "cuda" or (device.index or 0) >= torch.cuda.device_count():
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name}: {str(error).splitlines()[0]}; use auto or cpu") from error
    return device
