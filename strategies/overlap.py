"""What a sum of costs does not see: collectives that run beside kernels.

Weights can be gathered before they are used, and gradients reduced while others are still computed. How much of that is
hidden depends on all the rest, which a sum cannot say. So the problem is solved with such collectives at a part of
their seconds, for a few parts, and the simulator says which solution is fastest.
"""

from __future__ import annotations

import dataclasses

from ffjax.strategies.problem import Problem

EXPOSED = (1.0, 0.4, 0.02)
"""The parts of their seconds at which such collectives are priced."""


def overlapped(problem: Problem, exposed: float) -> Problem:
    """The problem with only so much of the seconds of collectives that nothing in the step waits for."""
    if exposed == 1.0:
        return problem
    return dataclasses.replace(
        problem,
        nodes=[dataclasses.replace(n, reduction_s=n.reduction_s * exposed) if n.late else n for n in problem.nodes],
        transfers=[dataclasses.replace(t, seconds=t.seconds * exposed) if t.ahead else t for t in problem.transfers],
    )
