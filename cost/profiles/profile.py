"""What was measured: samples of ops and collectives on one kind of device under one version of jax.

A profile is plain data, from a database (`ffjax.cost.profiles.store`) or a text file (`ffjax.cost.profiles.text`). It
belongs to one kind of device and one jax: `mismatch` says what is foreign or stale about it, and who uses one asks.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ffjax.errors import ProfileError
from ffjax.ir.spec import COLLECTIVE_KINDS

Key = tuple[str, str, str]
"""Kind of work, its parameters, dtype."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One measured op at one local shape, or one collective.

    `sizes` are as `ffjax.cost.work` has them: bytes for what streams, (devices, hosts, fewest devices on one host,
    bytes) for a collective. `flops` and `bytes` are counted as `ffjax.cost.kernels` counts them.
    """

    kind: str
    params: str = ""
    dtype: str = ""
    sizes: tuple[float, ...]
    flops: float
    bytes: float
    seconds: float  # median of the runs
    spread: float  # half the distance between the quartiles, as a share of the median
    runs: int
    date: str  # YYYY-MM-DD

    @property
    def key(self) -> Key:
        return (self.kind, self.params, self.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Analysis:
    """What XLA's cost analysis says of one op, compiled alone at one local shape, beside what the jaxpr says."""

    kind: str
    params: str = ""
    dtype: str = ""
    sizes: tuple[float, ...]
    flops: float
    bytes: float
    compiled_flops: float
    compiled_bytes: float

    @property
    def key(self) -> Key:
        return (self.kind, self.params, self.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Samples of one kind of device under one jax. Two are equal if what they hold is.

    Raises ProfileError for a sample that cannot be: seconds that are not positive, sizes that differ in number.
    """

    name: str = field(compare=False)
    device_kind: str = field(compare=False)
    jax: str = field(compare=False)
    samples: tuple[Sample, ...] = field(compare=False)
    analyses: tuple[Analysis, ...] = field(default=(), compare=False)
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        ranks: dict[Key, int] = {(kind, "", ""): 4 for kind in COLLECTIVE_KINDS}
        entries: tuple[Sample | Analysis, ...] = (*self.samples, *self.analyses)
        for entry in entries:
            if ranks.setdefault(entry.key, len(entry.sizes)) != len(entry.sizes):
                raise ProfileError(
                    f"profile {self.name!r}: {' '.join(filter(None, entry.key))} has entries of {len(entry.sizes)} "
                    f"sizes, expected {ranks[entry.key]}. Remedy: restore the file, or measure again: ffjax profile."
                )
        for sample in self.samples:
            if not 0 < sample.seconds < float("inf") or any(not 0 <= s < float("inf") for s in sample.sizes):
                raise ProfileError(
                    f"profile {self.name!r}: {sample.kind} of sizes {list(sample.sizes)} took {sample.seconds!r} s. "
                    "Remedy: restore the file, or measure again: ffjax profile."
                )
        content = repr((self.device_kind, self.jax, sorted(map(repr, self.samples)), sorted(map(repr, self.analyses))))
        object.__setattr__(self, "digest", hashlib.blake2b(content.encode(), digest_size=8).hexdigest())

    def __str__(self) -> str:
        return f"{self.name} ({self.digest}): {len(self.samples)} samples of {self.device_kind!r}, jax {self.jax}"

    def mismatch(self, device_kind: str, jax: str) -> str:
        """What keeps the profile from speaking for a kind of device under a jax; empty if nothing does."""
        wrong = []
        if self.device_kind != device_kind:
            wrong.append(f"is of the device kind {self.device_kind!r}, not {device_kind!r}")
        if self.jax != jax:
            wrong.append(f"was measured under jax {self.jax}, not {jax}")
        return f"profile {self.name!r} " + " and ".join(wrong) if wrong else ""

    def ops(self) -> Mapping[Key, list[Sample]]:
        """The samples of ops by what they do."""
        return _grouped(s for s in self.samples if s.kind not in COLLECTIVE_KINDS)

    def collectives(self) -> list[Sample]:
        return [s for s in self.samples if s.kind in COLLECTIVE_KINDS]


def _grouped(samples: Iterable[Sample]) -> dict[Key, list[Sample]]:
    groups: dict[Key, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.key, []).append(sample)
    return groups


@functools.cache
def jax_version() -> str:
    """The installed jax, without importing it."""
    return importlib.metadata.version("jax")


def machine_kind(kind: str, platform_: str, devices_per_host: int) -> str:
    """The kind under which profiles are kept: JAX calls every CPU `cpu`, so for those it names the machine.

    CPU devices share the machine's cores, so how many there are of them belongs to their kind.
    """
    if platform_ != "cpu":
        return kind
    return f"cpu: {_processor()}, {os.cpu_count()} cores as {devices_per_host} devices"


@functools.cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
