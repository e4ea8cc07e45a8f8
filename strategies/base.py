"""Named strategies: what a mesh axis is for, as a restriction of the one search space.

A strategy gives every mesh axis a role. A role says which factors the axis may split in which regions; the solver
then finds the best plan within it. So an expert's strategy exists for any model, and is always a point of the space
that the free search covers.

A strategy of your own is one file that calls `register`; once it is imported it competes. That of an installed package
is imported by itself, if the package says where it is:

    [project.entry-points."ffjax.strategies"]
    my_strategy = "my_package.my_strategy"
"""

from __future__ import annotations

import functools
import importlib.metadata
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from ffjax.errors import FfjaxWarning
from ffjax.ir.spec import MeshShape

ENTRY_POINTS = "ffjax.strategies"


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
    doc: str = ""

    def on(self, mesh: MeshShape) -> tuple[Role, ...] | None:
        """The role of each axis of a mesh; raises ValueError where the strategy gives something else."""
        roles = self.roles(mesh)
        if roles is None:
            return None
        if len(roles) != len(mesh.axes) or not all(isinstance(role, Role) for role in roles):
            raise ValueError(
                f"strategy {self.name!r} gives the roles {roles!r} for the mesh {mesh.as_dict()}; it must give one "
                "Role for each axis, or None where it has no use for the mesh"
            )
        return tuple(roles)


_REGISTRY: dict[str, Strategy] = {}


def register(strategy: Strategy) -> Strategy:
    """Adds a strategy to those that compete in every search; it is also `strategy="its name"` from then on.

    Raises:
      ValueError: for a name that is taken.

    >>> def roles(mesh):
    ...     return (Role.ZERO1,) * (len(mesh.axes) - 1) + (Role.TENSOR,)
    >>> register(Strategy(name="my zero1+tensor", roles=roles)).on(MeshShape(("x", "y"), (4, 2)))
    (<Role.ZERO1: ...>, <Role.TENSOR: ...>)
    >>> unregister("my zero1+tensor")
    """
    if strategy.name in _REGISTRY or strategy.name == "auto":
        raise ValueError(f"strategy {strategy.name!r} is registered already; choose another name")
    _REGISTRY[strategy.name] = strategy
    return strategy


def unregister(name: str) -> None:
    """Takes a strategy out again, as a test does; raises ValueError for an unknown name."""
    del _REGISTRY[named(name).name]


def named(name: str) -> Strategy:
    """A registered strategy; raises ValueError that lists them for an unknown name."""
    _import_installed()
    if name not in _REGISTRY:
        raise ValueError(f"unknown strategy {name!r}; known: auto, {', '.join(sorted(_REGISTRY))}")
    return _REGISTRY[name]


def all_strategies() -> tuple[Strategy, ...]:
    """All that compete, in the order of their registration."""
    _import_installed()
    return tuple(_REGISTRY.values())


@functools.cache
def _import_installed() -> None:
    """Imports the strategies of installed packages, once; what one of them lacks must not stop every plan."""
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            entry.load()
        except Exception as error:
            package = entry.dist.name if entry.dist is not None else entry.value
            warnings.warn(
                f"the strategy {entry.name!r} of the package {package!r} does not compete: importing {entry.value!r} "
                f"raised {type(error).__name__}: {error}. Remedy: mend or uninstall {package}.",
                FfjaxWarning,
                stacklevel=3,
            )
