"""Named strategies: what a mesh axis is for, as a restriction of the one search space.

A strategy gives every mesh axis a role. A role says which factors the axis may split in which regions; the solver
then finds the best plan within it. So an expert's strategy exists for any model, and is always a point of the space
that the free search covers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from ffjax.ir.spec import MeshShape


class Role(Enum):
    """What an axis may split."""

    DATA = "the batch of activations; state stays whole"
    FSDP = "the batch of activations, and one dimension of every state array; gathered where it is used"
    ZERO1 = "the batch of activations, and what only the optimizer uses; parameters and gradients stay whole"
    ZERO2 = "the batch of activations, gradients as they are summed, and what only the optimizer uses"
    TENSOR = "anything but the batch; state that it splits is used where it is, never gathered"
    SEQUENCE = "as TENSOR, and the sequence where no weights are at work: no activation stays whole"
    EXPERT = "the batch of activations or their experts; the experts of weights, which are never gathered"
    SPATIAL = "height or width of images; state stays whole"
    FREE = "anything"


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """`roles` gives a role for each axis of a mesh, or None where the strategy has no use for that mesh."""

    name: str
    roles: Callable[[MeshShape], Sequence[Role] | None]
    doc: str


_REGISTRY: dict[str, Strategy] = {}


def register(strategy: Strategy) -> Strategy:
    """Adds a strategy to those that compete in every search; raises ValueError for a name that is taken."""
    if strategy.name in _REGISTRY:
        raise ValueError(f"strategy {strategy.name!r} is registered already; choose another name")
    _REGISTRY[strategy.name] = strategy
    return strategy


def named(name: str) -> Strategy:
    """A registered strategy; raises ValueError that lists them for an unknown name."""
    if name not in _REGISTRY:
        raise ValueError(f"unknown strategy {name!r}; known: auto, {', '.join(sorted(_REGISTRY))}")
    return _REGISTRY[name]


def all_strategies() -> tuple[Strategy, ...]:
    return tuple(_REGISTRY.values())
