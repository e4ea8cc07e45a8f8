"""Seconds of kernels, from the best source that has something to say.

    measured      a sample of the same work at the same local sizes
    interpolated  base * exp(r), where r = log(measured / base) between the samples of the same work
    extrapolated  the same beyond all samples: the nearest one's r
    compiled      the roofline of what XLA's cost analysis counts (between analyses of the same work likewise)
    counted       base = max(flops / compute rate, bytes / memory rate) + launches * kernel_s, counted from the jaxpr

The ratio to the roofline varies slowly with the sizes where seconds do not: that is why it, and not the seconds, is
interpolated. Without a profile all is counted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from ffjax.cost.cluster import Cluster
from ffjax.cost.hardware import Device
from ffjax.cost.kernels import Kernel
from ffjax.cost.profiles.interpolate import Nearness, Table
from ffjax.cost.profiles.profile import Analysis, Key, Profile, Sample
from ffjax.cost.roofline import op_seconds
from ffjax.cost.work import CONVOLUTION, MATMUL, STREAMS

if TYPE_CHECKING:
    from ffjax.cost.region_costs import Splits

Floats = NDArray[np.float64]
Source = Literal["measured", "interpolated", "extrapolated", "compiled", "counted"]
SOURCES: tuple[Source, ...] = ("measured", "interpolated", "extrapolated", "compiled", "counted")

Entry = TypeVar("Entry", Sample, Analysis)

_BY_NEARNESS: Mapping[int, Source] = {
    Nearness.EXACT: "measured",
    Nearness.BETWEEN: "interpolated",
    Nearness.OUTSIDE: "extrapolated",
}


class OpTimes:
    """What kernels cost on one device. `profile` is of that device."""

    def __init__(self, device: Device, profile: Profile | None = None) -> None:
        self.device = device
        self._measured: dict[Key, tuple[Table, Floats]] = {}
        self._compiled: dict[Key, tuple[Table, Table]] = {}
        self._known: dict[tuple[object, ...], tuple[Floats, NDArray[np.int64]]] = {}
        if profile is None:
            return
        for key, samples in profile.ops().items():
            ratios = _table(samples, lambda s: s.seconds / self._base_of(s))
            self._measured[key] = (ratios, np.array([s.seconds for s in samples]))
        for key in dict.fromkeys(a.key for a in profile.analyses):
            alike = [a for a in profile.analyses if a.key == key and a.compiled_flops >= 0 and a.compiled_bytes > 0]
            if alike:
                self._compiled[key] = (
                    _table(alike, lambda a: max(a.compiled_flops, 1.0) / max(a.flops, 1.0)),
                    _table(alike, lambda a: a.compiled_bytes / max(a.bytes, 1.0)),
                )

    @property
    def counts_only(self) -> bool:
        return not self._measured and not self._compiled

    def seconds(self, kernels: Sequence[Kernel], splits: Splits) -> Floats:
        """For each candidate the seconds of these kernels in one step, all trips together."""
        total = np.zeros(len(splits.counts))
        for seconds in self.by_source(kernels, splits).values():
            total += seconds
        return total

    def by_source(self, kernels: Sequence[Kernel], splits: Splits) -> dict[Source, Floats]:
        """`seconds`, by where they are from."""
        if self.counts_only:
            return {"counted": _counted_seconds(kernels, splits, self.device)}
        found: dict[Source, Floats] = {}
        counted = []
        for kernel in kernels:
            if kernel.work.key not in self._measured and kernel.work.key not in self._compiled:
                counted.append(kernel)
                continue
            # Candidates that split the kernel's atoms alike run it at the same local shape.
            atoms = tuple(
                sorted({a for dims, _ in kernel.traffic for dim in dims for a in dim} | set(kernel.iteration))
            )
            pieces, which = splits.distinct(atoms)
            seconds, nearness = self._priced(kernel, atoms, pieces)
            for code in np.unique(nearness):
                source: Source = _BY_NEARNESS[int(code)] if code in _BY_NEARNESS else "compiled"
                part = np.where(nearness == code, kernel.trips * seconds, 0.0)[which]
                found[source] = found[source] + part if source in found else part
        if counted:
            found["counted"] = _counted_seconds(counted, splits, self.device)
        return found

    def _priced(self, kernel: Kernel, atoms: tuple[int, ...], pieces: Floats) -> tuple[Floats, NDArray[np.int64]]:
        """Seconds of one run for each row of `pieces` (into how many each atom is split), and where they are from."""
        known = (kernel.work, kernel.flops, kernel.traffic, kernel.iteration, kernel.launches, pieces.tobytes())
        found = self._known.get(known)
        if found is not None:
            return found
        column = {atom: i for i, atom in enumerate(atoms)}

        def split(which: Sequence[int]) -> Floats:
            pieces_of: Floats = np.prod(pieces[:, sorted({column[a] for a in which})], axis=1)
            return pieces_of

        flops = kernel.flops / split(kernel.iteration)
        size = np.zeros(len(pieces))
        for dims, whole in kernel.traffic:
            size += whole / split([a for dim in dims for a in dim])
        sizes = (
            size[:, None]
            if kernel.work.kind in STREAMS
            else np.stack([whole / split(a) for whole, a in kernel.work.sizes], axis=1).reshape(len(pieces), -1)
        )
        key = kernel.work.key
        if key in self._measured:
            ratios, measured = self._measured[key]
            ratio, nearness, nearest = ratios.at(sizes)
            between = self._base(flops, size, kernel) * np.exp(ratio)
            # What streams inside another kernel's launch was never measured as it is.
            exact = (nearness == Nearness.EXACT) & (kernel.launches > 0)
            found = np.where(exact, measured[nearest], between), nearness
        else:
            more_flops, more_bytes = (np.exp(table.at(sizes)[0]) for table in self._compiled[key])
            found = self._base(flops * more_flops, size * more_bytes, kernel), np.full(len(pieces), -1, np.int64)
        self._known[known] = found
        return found

    def base_s(self, flops: float, size: float, kernel: Kernel) -> float:
        """The roofline of one run of a kernel with these counts, and its launches."""
        return float(self._base(np.array([flops]), np.array([size]), kernel)[0])

    def _base(self, flops: Floats, size: Floats, kernel: Kernel) -> Floats:
        dtype = kernel.dtype if kernel.matmul else "float32"
        return (
            op_seconds(flops, size, dtype, self.device, matmul=kernel.matmul) + kernel.launches * self.device.kernel_s
        )

    def _base_of(self, sample: Sample) -> float:
        matmul = sample.kind in (MATMUL, CONVOLUTION)
        dtype = sample.dtype if matmul else "float32"
        return op_seconds(sample.flops, sample.bytes, dtype, self.device, matmul=matmul) + self.device.kernel_s


@functools.lru_cache(maxsize=16)
def op_times(cluster: Cluster) -> OpTimes:
    """What kernels cost on a cluster's devices, by its profile if it has one."""
    return OpTimes(cluster.device, cluster.profile)


def _table(entries: Sequence[Entry], ratio: Callable[[Entry], float]) -> Table:
    return Table([e.sizes for e in entries], [float(np.log(ratio(e))) for e in entries])


def _counted_seconds(kernels: Sequence[Kernel], splits: Splits, device: Device) -> Floats:
    """The roofline of what the jaxpr says."""
    total = np.zeros(len(splits.counts))
    # Elementwise kernels of one region differ in little else than bytes: add up what is split alike.
    work: dict[tuple[int, ...], list[float]] = {}
    streams: dict[tuple[int, ...], dict[tuple[int, ...], float]] = {}
    for kernel in kernels:
        if kernel.matmul:
            traffic = np.zeros(len(total))
            for port, whole in kernel.traffic:
                traffic += whole / splits.of_dims(port)
            flops = kernel.flops / splits.of(kernel.iteration)
            seconds = op_seconds(flops, traffic, kernel.dtype, device, matmul=True) + device.kernel_s
            total += kernel.trips * seconds
            continue
        spread = tuple(sorted(kernel.iteration))
        entry = work.setdefault(spread, [0.0, 0.0])
        entry[0] += kernel.trips * kernel.flops
        entry[1] += kernel.trips * kernel.launches
        alike = streams.setdefault(spread, {})
        for dims, size in kernel.traffic:
            key = tuple(sorted({a for dim in dims for a in dim}))
            alike[key] = alike.get(key, 0.0) + kernel.trips * size
    for spread, (arithmetic, launches) in work.items():
        traffic = np.zeros(len(total))
        for atoms, size in streams[spread].items():
            traffic += size / splits.of(atoms)
        total += op_seconds(arithmetic / splits.of(spread), traffic, "float32", device, matmul=False)
        total += launches * device.kernel_s
    return total
