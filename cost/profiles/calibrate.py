"""A cluster's figures from measurements: what is not in a profile gains by what is.

    flops_per_s[dtype] * matmul_efficiency   the rate that the upper tenth of that dtype's matmuls reaches
    memory_bytes_per_s * memory_efficiency   from the line seconds = launch + bytes / rate through the largest streams
    kernel_s                                 what the line through the smaller streams leaves for no bytes
    vector_flops_per_s                       raised to the elements a second of the fastest stream, never lowered:
                                             a stream is bound by memory
    link efficiency, latency_s               from the measured lines of collectives inside a host, and across

A peak stays as published where the measured rate is below it, and is raised to that rate where it is not.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from ffjax.cost.hardware import Device, Link
from ffjax.cost.profiles.link_fits import Line, fit_line, link_fits
from ffjax.cost.profiles.profile import Profile, Sample, jax_version
from ffjax.cost.profiles.store import open_profile
from ffjax.cost.work import ELEMENTWISE, MATMUL
from ffjax.errors import FfjaxWarning, ProfileError

if TYPE_CHECKING:
    from ffjax.cost.cluster import Cluster

_LARGE_BYTES = 1 << 22  # streams at least so large tell the memory's rate; smaller ones may live in a cache
_FEW = 3


def with_profile(cluster: Cluster, profile: Profile | str | Path, *, accept_other: bool = False) -> Cluster:
    """See `Cluster.with_profile`."""
    jax = jax_version()
    if not isinstance(profile, Profile):
        profile = open_profile(profile, cluster.machine_kind, jax, accept_other=accept_other)
    if wrong := profile.mismatch(cluster.machine_kind, jax):
        if not accept_other:
            raise ProfileError(
                f"{wrong}. Remedy: measure there (ffjax profile), or use it as it is, with a warning: "
                "with_profile(..., accept_other=True), on the command line --accept-other-profile."
            )
        warnings.warn(f"{wrong}; it is used as it is", FfjaxWarning, stacklevel=3)
    return dataclasses.replace(calibrated(cluster, profile), profile=profile)


def calibrated(cluster: Cluster, profile: Profile) -> Cluster:
    """The cluster with figures fitted to a profile, as far as that has samples for them; without the profile."""
    device = _with_streams(_with_matmuls(cluster.device, profile), profile)
    fitted = dataclasses.replace(cluster, device=device, profile=None)
    links = tuple(_fitted_link(fitted, level, profile) for level in range(len(cluster.links)))
    return dataclasses.replace(fitted, links=links)


def _with_matmuls(device: Device, profile: Profile) -> Device:
    rates: dict[str, float] = {}
    for (kind, _, dtype), samples in profile.ops().items():
        # Below this many, the best of them need not be near what a large matmul reaches.
        if kind == MATMUL and len(samples) >= _FEW:
            rates[dtype] = float(np.quantile([s.flops / s.seconds for s in samples], 0.9))
    if not rates:
        return device
    share = min(1.0, max(rate / device.peak_flops_per_s(dtype) for dtype, rate in rates.items()))
    peaks = {**device.flops_per_s, **{dtype: rate / share for dtype, rate in rates.items()}}
    return dataclasses.replace(device, flops_per_s=peaks, matmul_efficiency=share)


def _with_streams(device: Device, profile: Profile) -> Device:
    samples = sorted(
        (s for key, found in profile.ops().items() if key[0] == ELEMENTWISE for s in found), key=lambda s: s.bytes
    )
    if len(samples) < _FEW:
        return device
    small = [s for s in samples if s.bytes < _LARGE_BYTES]
    kernel_s = fit_line([(s.bytes, s.seconds) for s in small]).alpha_s if len(small) >= _FEW else samples[0].seconds
    vector = max(s.flops / s.seconds for s in samples)
    rate = _streaming_rate(samples)
    peak = max(device.memory_bytes_per_s, rate)
    return dataclasses.replace(
        device,
        kernel_s=kernel_s,
        vector_flops_per_s=max(device.vector_flops_per_s, vector),
        memory_bytes_per_s=peak,
        memory_efficiency=rate / peak,
    )


def _streaming_rate(samples: list[Sample]) -> float:
    large = [s for s in samples if s.bytes >= _LARGE_BYTES] or samples[-_FEW:]
    line = fit_line([(s.bytes, s.seconds) for s in large])
    return 1 / line.beta_s_per_byte if line.beta_s_per_byte > 0 else large[-1].bytes / large[-1].seconds


def _fitted_link(cluster: Cluster, level: int, profile: Profile) -> Link:
    """One link's rate and latency, from the formulas of `ffjax.cost.collectives` turned round."""
    link = cluster.links[level]
    rates: list[float] = []
    latencies: list[float] = []
    for (kind, group), line in link_fits(profile).items():
        # Groups that have devices of one host and of several tell of both links at once: of neither alone.
        if group.crosses_hosts != bool(level) or (group.crosses_hosts and group.shares_host):
            continue
        n = group.devices
        steps = {"all_gather": n - 1, "all_reduce": 2 * math.ceil(math.log2(n)), "collective_permute": 1}.get(kind)
        share = {"all_gather": (n - 1) / n, "all_reduce": 2 * (n - 1) / n, "collective_permute": 1.0}.get(kind)
        if steps is None or share is None:
            continue
        rates += _rate(line, share)
        latencies.append(max(line.alpha_s - cluster.device.kernel_s, 0.0) / steps)
    if not rates:
        return link
    rate = median(rates)
    peak = max(link.bytes_per_s, rate)
    return dataclasses.replace(link, bytes_per_s=peak, efficiency=rate / peak, latency_s=median(latencies))


def _rate(line: Line, share: float) -> list[float]:
    return [share / line.beta_s_per_byte] if line.beta_s_per_byte > 0 else []


def cluster_text(cluster: Cluster) -> str:
    """A cluster as the TOML text that `Cluster.load` reads; without its target config and its profile."""
    device = cluster.device
    quoted = "[" + ", ".join(f'"{part}"' for part in device.kind_matches) + "]"
    lines = [
        f'name = "{cluster.name}"',
        f"hosts = {cluster.hosts}",
        f"devices_per_host = {list(cluster.host_sizes) or cluster.devices_per_host}",
        f"reduce_scatter = {str(cluster.reduce_scatter).lower()}",
        "",
        "[device]",
        f'kind = "{device.kind}"',
        f"kind_matches = {quoted}",
        f'platform = "{device.platform}"',
        f"memory_bytes = {device.memory_bytes}",
        *(
            f"{name} = {getattr(device, name):.6g}"
            for name in (
                "memory_bytes_per_s",
                "vector_flops_per_s",
                "matmul_efficiency",
                "memory_efficiency",
                "kernel_s",
            )
        ),
        "",
        "[device.flops_per_s]",
        *(f"{dtype} = {peak:.6g}" for dtype, peak in device.flops_per_s.items()),
    ]
    for link in cluster.links:
        lines += [
            "",
            "[[links]]",
            f'name = "{link.name}"',
            *(f"{name} = {getattr(link, name):.6g}" for name in ("bytes_per_s", "efficiency", "latency_s")),
        ]
    return "\n".join(lines) + "\n"
