"""Temporaries in the buffers of results that are not there yet.

XLA's buffer assignment goes from the largest buffer to the smallest. A result gets memory of its own for the whole
step; a temporary that is no larger and is never in memory together with what is in that already is put there, at its
start, into the smallest such. All that is left shares one heap.
"""

from __future__ import annotations

from bisect import bisect_left

import numpy as np
from numpy.typing import NDArray

_ALIKE = 1 + 1e-9
_LEAST = 1e-3
"""Temporaries smaller than this share of the peak are left in the heap: they would decide nothing."""


def in_result_buffers(
    results: NDArray[np.float64],
    made: NDArray[np.int64],
    sizes: NDArray[np.float64],
    first: NDArray[np.int64],
    last: NDArray[np.int64],
) -> NDArray[np.bool_]:
    """Which temporaries are in a result's buffer.

    Args:
      results: the bytes of each result that has a buffer of its own, [results].
      made: the instant at which each is there, [results].
      sizes: the bytes of temporaries, [temporaries].
      first: the instants from which they are in memory, [temporaries].
      last: those until which they are, [temporaries].

    >>> ones = np.ones(3, dtype=int)
    >>> in_result_buffers(np.array([8.0]), np.array([9]), np.array([8.0, 6.0, 4.0]), ones * [1, 2, 4], ones * [3, 5, 5])
    array([ True, False,  True])
    """
    held = np.zeros(len(sizes), dtype=np.bool_)
    order = np.argsort(results, kind="stable")
    by_size = results[order].tolist()
    # For each buffer, the smallest first, what is in it: when each begins, and when each ends.
    begins: list[list[int]] = [[at] for at in made[order].tolist()]
    ends: list[list[int]] = [[np.iinfo(np.int64).max] for _ in by_size]
    if not by_size:
        return held
    worth = np.flatnonzero((sizes >= _LEAST * (sizes.max(initial=0.0) + results.sum())) & (first <= last))
    for index in worth[np.lexsort((last[worth], first[worth], -np.round(sizes[worth])))].tolist():
        since, until = int(first[index]), int(last[index])
        for buffer in range(bisect_left(by_size, sizes[index] / _ALIKE), len(by_size)):
            place = bisect_left(begins[buffer], since)
            after = begins[buffer][place] if place < len(begins[buffer]) else until + 1
            if until < after and (place == 0 or ends[buffer][place - 1] < since):
                begins[buffer].insert(place, since)
                ends[buffer].insert(place, until)
                held[index] = True
                break
    return held
