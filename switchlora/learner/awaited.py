"""Numbers of a device that the host reads later, without waiting for what was launched since."""

import torch
from torch import Tensor

READ_LATE = ["cuda"]
"""types of devices that work on their own while the host goes on"""


def reads_late(device: torch.device) -> bool:
    """Return whether the host should read numbers of ``device`` only when they have arrived."""
    return device.type in READ_LATE


class Awaited:
    """Numbers (n,) on their way to the host.

    On CUDA they are copied to pinned memory, which stops nobody. On other devices it is a plain
    copy.
    """

    def __init__(self, numbers: Tensor) -> None:
        self._numbers = numbers.to("cpu", non_blocking=reads_late(numbers.device))
        self._arrived = torch.cuda.Event() if numbers.is_cuda else None
        if self._arrived is not None:
            self._arrived.record()

    def read(self) -> list[float]:
        """Wait until the numbers have arrived, and return them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._numbers.tolist()
