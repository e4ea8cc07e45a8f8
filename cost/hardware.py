"""The hardware that clusters are made of, as data: one device, one level of links; and amounts of memory as text."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

import numpy as np

from ffjax.cost.toml_fields import Fields, did_you_mean
from ffjax.errors import ClusterError

Platform: TypeAlias = Literal["cpu", "gpu", "tpu"]

_UNITS = {
    "": 1,
    "B": 1,
    **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)},
    **{f"{p}iB": 1024**i for i, p in enumerate("KMGT", 1)},
}

# One right line for each field of a cluster file: what errors propose.
EXAMPLES = {
    "name": 'name = "my-cluster"',
    "hosts": "hosts = 8",
    "devices_per_host": "devices_per_host = 8",
    "reduce_scatter": "reduce_scatter = true",
    "async_collectives": "async_collectives = true",
    "target_config": 'target_config = "h100.txtpb"',
    "device": "a [device] table",
    "links": "a [[links]] table for the link inside a host, then one for the network across hosts",
    "kind": 'kind = "NVIDIA H100 80GB HBM3"',
    "kind_matches": 'kind_matches = ["H100"]',
    "platform": 'platform = "gpu"',
    "memory_bytes": 'memory_bytes = "80GiB"',
    "memory_bytes_per_s": "memory_bytes_per_s = 3.35e12",
    "vector_flops_per_s": "vector_flops_per_s = 66.9e12",
    "matmul_efficiency": "matmul_efficiency = 0.75",
    "memory_efficiency": "memory_efficiency = 0.9",
    "kernel_s": "kernel_s = 2.5e-6",
    "flops_per_s": "a [device.flops_per_s] table with at least float32 = 494.7e12",
    "bytes_per_s": "bytes_per_s = 450e9",
    "efficiency": "efficiency = 0.8",
    "latency_s": "latency_s = 2e-6",
}


def parse_bytes(text: str | float) -> int:
    """A number of bytes from `"70GiB"`, `"80GB"`, `"512 MiB"` or a number of bytes.

    Raises ClusterError for what is neither, or not positive.

    >>> parse_bytes("70GiB"), parse_bytes("80GB"), parse_bytes(1024)
    (75161927680, 80000000000, 1024)
    """
    value = math.nan
    if isinstance(text, str):
        match = re.fullmatch(r"\s*([0-9_]*\.?[0-9]+(?:e[0-9]+)?)\s*([a-z]*)\s*", text, re.IGNORECASE)
        scale = {unit.lower(): size for unit, size in _UNITS.items()}.get(match[2].lower()) if match else None
        if match and scale is not None:
            value = float(match[1].replace("_", "")) * scale
    elif isinstance(text, int | float | np.number) and not isinstance(text, bool):
        value = float(text)
    if not (math.isfinite(value) and value >= 1):
        units = ", ".join(unit for unit in _UNITS if unit)
        raise ClusterError(f"{text!r} is no amount of memory; write bytes, or a number with a unit of {units}: '70GiB'")
    return math.ceil(value)  # a plan's peak, which may be a part of a byte, is a budget that it fits


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One device. Raises ClusterError where a number cannot be."""

    kind: str  # as jax.Device.device_kind has it
    platform: Platform
    # Dense matmul peaks by dtype. float32 is what XLA's default precision runs: TF32 tensor cores on A100 and H100.
    flops_per_s: Mapping[str, float] = field(hash=False)
    vector_flops_per_s: float  # outside the matrix units
    memory_bytes: int
    memory_bytes_per_s: float
    matmul_efficiency: float  # share of the peak that a large matmul reaches
    memory_efficiency: float  # share of memory_bytes_per_s that a streaming kernel reaches
    kernel_s: float  # fixed time of one kernel launch
    kind_matches: tuple[str, ...] = ()  # parts of other device kinds that this describes, any case

    def __post_init__(self) -> None:
        if self.platform not in get_args(Platform):
            known = get_args(Platform)
            raise ClusterError(
                f"platform = {self.platform!r}; must be one of {', '.join(known)}{did_you_mean(self.platform, known)}"
            )
        if "float32" not in self.flops_per_s:
            listed = ", ".join(self.flops_per_s) or "nothing"
            raise ClusterError(f"flops_per_s lists {listed}; add float32, which stands for every dtype not listed")
        for dtype, peak in self.flops_per_s.items():
            _check_positive(f"flops_per_s.{dtype}", peak)
        for name in ("vector_flops_per_s", "memory_bytes", "memory_bytes_per_s"):
            _check_positive(name, getattr(self, name))
        for name in ("matmul_efficiency", "memory_efficiency"):
            _check_share(name, getattr(self, name))
        _check_not_negative("kernel_s", self.kernel_s)

    def peak_flops_per_s(self, dtype: str) -> float:
        """The matmul peak of a dtype; float32's where it is not listed."""
        return self.flops_per_s.get(dtype, self.flops_per_s["float32"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One level of links. Raises ClusterError where a number cannot be."""

    name: str
    bytes_per_s: float  # of one device, in one direction
    latency_s: float  # of one step of a collective, or one hop
    efficiency: float = 1.0  # share of bytes_per_s that a large collective reaches

    def __post_init__(self) -> None:
        _check_positive("bytes_per_s", self.bytes_per_s)
        _check_not_negative("latency_s", self.latency_s)
        _check_share("efficiency", self.efficiency)

    @property
    def effective_bytes_per_s(self) -> float:
        return self.bytes_per_s * self.efficiency


def read_device(fields: Fields) -> Device:
    """The device that a `[device]` table describes."""
    return Device(
        kind=fields.text("kind"),
        platform=fields.text("platform"),  # type: ignore[arg-type]  # Device checks it
        flops_per_s=fields.numbers("flops_per_s"),
        vector_flops_per_s=fields.number("vector_flops_per_s"),
        memory_bytes=parse_bytes(fields.number_or_text("memory_bytes")),
        memory_bytes_per_s=fields.number("memory_bytes_per_s"),
        matmul_efficiency=fields.number("matmul_efficiency"),
        memory_efficiency=fields.number("memory_efficiency"),
        kernel_s=fields.number("kernel_s"),
        kind_matches=fields.texts("kind_matches") if fields.has("kind_matches") else (),
    )


def read_link(fields: Fields) -> Link:
    """The link that one of the `[[links]]` tables describes."""
    return Link(
        name=fields.text("name"),
        bytes_per_s=fields.number("bytes_per_s"),
        latency_s=fields.number("latency_s"),
        efficiency=fields.number("efficiency") if fields.has("efficiency") else 1.0,
    )


def _check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ClusterError(f"{name} = {value!r}; must be a positive number, such as {_example(name)}")


def _check_not_negative(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ClusterError(f"{name} = {value!r}; must be zero or more seconds, such as {_example(name)}")


def _check_share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ClusterError(f"{name} = {value!r}; must be above 0 and at most 1, such as {_example(name)}")


def _example(name: str) -> str:
    return EXAMPLES.get(name, f"{name} = 1e12")
