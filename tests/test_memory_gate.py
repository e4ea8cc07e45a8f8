"""Predicted peak memory against recorded figures of XLA:GPU and XLA:CPU: what was reached may not be lost.

Record again (`benchmarks/memory.py --record`) where the programs or the plans' families change, and tighten what is
accepted where the model gets better.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from ffjax.cost.hardware import Platform

sys.path.insert(0, str(Path(__file__).parent))
from memory_cases import RECORDED, Recorded, predictions


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """`near`: the share within 10%; `under`: the share more than 5% below; `worst`, `most`: the extreme ratios."""

    near: float
    under: float
    worst: float
    most: float
    median: tuple[float, float] = (0.97, 1.06)


ACCEPTED: dict[tuple[Platform, bool], Accepted] = {
    ("gpu", False): Accepted(near=0.90, under=0.075, worst=0.69, most=1.28),
    ("gpu", True): Accepted(near=0.95, under=0.05, worst=0.82, most=1.09),
    ("cpu", False): Accepted(near=0.96, under=0.045, worst=0.87, most=1.64),
    ("cpu", True): Accepted(near=0.99, under=0.01, worst=0.98, most=1.08),
}
"""By platform, for the models that the figures in `ffjax.cost.compilers` were fitted to, and for those held out."""


@pytest.mark.recorded
@pytest.mark.parametrize("platform", ["gpu", "cpu"])
def test_recorded_peaks(platform: Platform) -> None:
    recorded = Recorded.read(RECORDED, platform)
    found = list(predictions(recorded, platform))
    assert len(found) == len(recorded.donated) + len(recorded.kept) > 100, "record again: some cases are not there"
    for held_out in (False, True):
        accepted = ACCEPTED[platform, held_out]
        ratios = {str(c): p / b for c, p, b in found if ("held out" in c.model) == held_out}
        values = np.array(list(ratios.values()))
        near, under = float(np.mean(abs(values - 1) <= 0.1)), float(np.mean(values < 0.95))
        low, high = min(ratios, key=ratios.__getitem__), max(ratios, key=ratios.__getitem__)
        said = (
            f"{platform}, held out: {held_out}: {near:.3f} near, {under:.3f} under, median {np.median(values):.3f}, "
            f"worst {ratios[low]:.3f} ({low}), most {ratios[high]:.3f} ({high})"
        )
        assert near >= accepted.near, said
        assert under <= accepted.under, said
        assert ratios[low] >= accepted.worst, said
        assert ratios[high] <= accepted.most, said
        assert accepted.median[0] <= np.median(values) <= accepted.median[1], said
