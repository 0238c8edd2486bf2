"""Devices by name: what their makers say of them, and the rates that training gets there."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from switchlora.adapters import Rates
from switchlora.config import read_yaml
from switchlora.cost.machine import EAGER_BANDWIDTH, EAGER_HOST, SHORTEST_KERNEL, Machine
from switchlora.names import near

FILE = Path(__file__).with_name("devices.yaml")
ATTENTION = 0.55
"""rate of attention, forward and backward together, relative to that of products"""
HALF_WIDTH = 60.0
"""shortest side at which a product has half of its rate; fitted to ViT-Ti on an RTX 3090"""


@dataclass(frozen=True)
class Hardware:
    """A device and what connects several of them."""

    name: str
    peak: Mapping[str, float]
    """dense FLOP/s of products by precision"""
    reached: float
    """share of ``peak`` that large products reach"""
    bandwidth: float
    """bytes/s of memory"""
    memory: float
    """bytes that a program can use"""
    watts: float
    link: float
    """bytes/s at which a ring averages within a machine"""
    node: int
    """devices of a machine"""
    network: float
    """bytes/s from a machine to the next"""
    source: str

    def machine(
        self, precision: str, compiled: bool, host: float | None = None, graphs: bool = False
    ) -> Machine:
        """Return the rates of one device in ``precision``, of ``compiled`` code or of CUDA graphs.

        ``host`` are the seconds of the host for an operation, instead of the measured ones.
        """
        product_rate = self.peak[precision] * self.reached
        eager = Machine(
            product_rate=product_rate,
            attention_rate=product_rate * ATTENTION,
            bandwidth=self.bandwidth * EAGER_BANDWIDTH,
            latency=SHORTEST_KERNEL,
            half_width=HALF_WIDTH,
            host=EAGER_HOST if host is None else host,
        )
        return eager.compiled(graphs) if compiled else eager

    def rates(self, precision: str) -> Rates:
        """Return what decides the form of a product with an adapter, in ``precision``."""
        machine = self.machine(precision, compiled=False)
        return Rates(machine.product_rate, machine.bandwidth, machine.latency)

    def ring(self, devices: int) -> float:
        """Return the bytes/s at which a ring over ``devices`` passes gradients on."""
        return self.link if devices <= self.node else min(self.link, self.network)


@cache
def all_hardware() -> Mapping[str, Hardware]:
    """Return all devices of ``FILE`` by name."""
    return {name: _read(name, entry) for name, entry in read_yaml(FILE).items()}


def hardware_like(device: str) -> Hardware | None:
    """Return the known device that a driver calls ``device``, such as 'NVIDIA A100-SXM4-80GB'."""
    given = re.sub("[^a-z0-9]", "", device.lower())
    for name, hardware in all_hardware().items():
        if all(part in given for part in name.split("-")):
            return hardware
    return None


def _read(name: str, entry: Mapping) -> Hardware:
    return Hardware(
        name=name,
        peak={precision: 1e12 * rate for precision, rate in entry["peak"].items()},
        reached=entry["reached"],
        bandwidth=1e12 * entry["bandwidth"],
        memory=2**30 * entry["memory"],
        watts=entry["watts"],
        link=1e9 * entry["link"],
        node=entry["node"],
        network=1e9 * entry["network"],
        source=entry["source"],
    )


def hardware_named(name: str) -> Hardware:
    """Return a device by its name; ValueError with near names for an unknown one."""
    known = all_hardware()
    if name not in known:
        raise ValueError(f"hardware '{name}' is not known; {near(name, known)}")
    return known[name]
