"""Find the device that a name stands for."""

import torch


def find_device(key: str, name: str) -> torch.device:
    """Return the device ``name``, or for 'auto' the GPU if there is one.

    It becomes torch's present one. ValueError, which names the ``key``, if it cannot be used.
    """
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device())
    try:
        zero = torch.zeros((), device=name)
        zero.item()  # the device 'meta' holds no numbers
        device = zero.device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return device
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{key} '{name}' cannot be used: {reason}") from error
