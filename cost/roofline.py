"""Time of one kernel: the roofline.

    seconds = max(flops / compute rate, bytes / memory rate)

The compute rate is the dtype's matmul peak times what a large matmul reaches, or the vector rate for all other
ops; the memory rate is the peak times what a streaming kernel reaches. Bytes are those that cross a fusion's
boundary. The fixed time of a launch (`Device.kernel_s`) is the caller's to add, once for each fusion.
Williams, Waterman, Patterson: "Roofline", CACM 52(4), 2009.
"""

from __future__ import annotations

from typing import TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

from ffjax.cost.hardware import Device

Floats: TypeAlias = NDArray[np.float64]


@overload
def op_seconds(flops: float, bytes: float, dtype: str, device: Device, *, matmul: bool) -> float: ...
@overload
def op_seconds(flops: Floats, bytes: Floats | float, dtype: str, device: Device, *, matmul: bool) -> Floats: ...
@overload
def op_seconds(flops: float, bytes: Floats, dtype: str, device: Device, *, matmul: bool) -> Floats: ...
def op_seconds(
    flops: float | Floats,
    bytes: float | Floats,  # noqa: A002  # the quantity's name, as in Collective
    dtype: str,
    device: Device,
    *,
    matmul: bool,
) -> float | Floats:
    """Seconds of one kernel on one device, without its launch.

    Args:
      flops: floating-point operations of the local shape (2 for a multiply-add), a number or an array.
      bytes: bytes read and written at the fusion's boundary, a number or an array of the same shape.
      dtype: of a matmul's operands, as `str(numpy dtype)`.
      matmul: whether the matrix units do it (dots and convolutions).

    >>> from ffjax.cost.cluster import Cluster
    >>> h100 = Cluster.named("h100").device
    >>> round(op_seconds(2 * 8192**3, 3 * 2 * 8192**2, "bfloat16", h100, matmul=True) * 1e3, 2)  # ms
    1.48
    """
    rate = device.peak_flops_per_s(dtype) * device.matmul_efficiency if matmul else device.vector_flops_per_s
    memory_rate = device.memory_bytes_per_s * device.memory_efficiency
    if isinstance(flops, np.ndarray) or isinstance(bytes, np.ndarray):
        return np.maximum(np.asarray(flops) / rate, np.asarray(bytes) / memory_rate)
    return max(flops / rate, bytes / memory_rate)
