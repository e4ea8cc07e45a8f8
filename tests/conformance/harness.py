"""What every step must pass: it plans, runs, computes what it computes unsharded, and communicates as predicted.

`@idiom()` on a function that makes a step and its arguments adds it to `IDIOMS`. Sizes are tiny, but divide by eight.
"""

from __future__ import annotations

import pathlib
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

import ffjax
from ffjax.emit.oracle import explicit_collectives
from ffjax.errors import FfjaxWarning
from ffjax.ir.spec import MeshShape
from ffjax.testing import assert_same_numerics

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from programs import Case
from running import counted, eager_cluster, results_of, unsharded

MESHES = (MeshShape(("x",), (8,)), MeshShape(("x", "y"), (4, 2)))
STRATEGIES = ("auto", "data_parallel", "fsdp", "tensor_parallel")


@dataclass(frozen=True, slots=True, kw_only=True)
class Idiom:
    """A row of the table."""

    name: str
    group: str
    make: Callable[[], Case]
    warns: str = ""
    """What the one FfjaxWarning that planning gives is about; where this is empty there must be none."""
    compare_as: str = ""
    """A narrower dtype in which floating-point results are compared: the one that they are computed in."""
    x64: bool = False
    """Whether it runs with `jax_enable_x64`."""
    mesh: MeshShape | None = None
    """The mesh that it is for, if it brings one: then its own collectives are compared, too."""


@dataclass(slots=True, kw_only=True)
class Outcome:
    """Each is `yes`, or what went wrong; `-` where an earlier one did, or it was not asked for.

    `collectives` is `fewer` where every collective was planned, in kind, mesh axes and bytes, but not every planned one
    is left: the compiler computes once what the program computes twice.
    """

    plan: str = "-"
    run: str = "-"
    numerics: str = "-"
    collectives: str = "-"
    warned: list[str] = field(default_factory=list)

    @property
    def failures(self) -> list[str]:
        found = {"plan": self.plan, "run": self.run, "numerics": self.numerics, "collectives": self.collectives}
        return [f"{what}: {said}" for what, said in found.items() if said not in ("yes", "fewer", "-")]


IDIOMS: dict[str, Idiom] = {}


def idiom(
    *, warns: str = "", compare_as: str = "", x64: bool = False, mesh: dict[str, int] | None = None
) -> Callable[[Callable[[], Case]], Callable[[], Case]]:
    """Adds a row, named for its function and grouped by its module."""

    def register(make: Callable[[], Case]) -> Callable[[], Case]:
        name, group = make.__name__, make.__module__.rsplit(".", 1)[-1]
        if name in IDIOMS:
            raise ValueError(f"idiom {name!r} is in the table already")
        own = None if mesh is None else MeshShape(tuple(mesh), tuple(mesh.values()))
        IDIOMS[name] = Idiom(name=name, group=group, make=make, warns=warns, compare_as=compare_as, x64=x64, mesh=own)
        return make

    return register


def check(row: Idiom, strategy: str, mesh: MeshShape, *, run: bool = True) -> Outcome:
    """Plans a step, runs it three times if it has a state, and compares; without `run` only its collectives."""
    with jax.enable_x64(row.x64):
        return _check(row, strategy, row.mesh or mesh, run)


def _check(row: Idiom, strategy: str, mesh: MeshShape, run: bool) -> Outcome:
    outcome = Outcome()
    case = row.make()
    step = ffjax.autoshard(
        case.step,
        cluster=eager_cluster(),
        strategy=strategy,
        mesh=mesh.as_dict(),
        static_argnums=case.static_argnums,
        donate_argnums=case.donate_argnums,
    )
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", FfjaxWarning)
            plan = step.plan(*case.args, **case.kwargs)
        outcome.warned = [str(w.message) for w in caught if issubclass(w.category, FfjaxWarning)]
        outcome.plan = _warnings(row, outcome.warned)
    except Exception as error:
        outcome.plan = _said(error)
        return outcome
    try:
        lowered = plan.lower(jax.devices()[: mesh.devices])
        planned, emitted = list(plan.bound.collectives()), explicit_collectives(lowered)
        ours, theirs = (counted(found, own=row.mesh is not None) for found in (planned, emitted))
        missing, surplus = ours - theirs, theirs - ours
        wrong = f"planned {missing}, emitted {surplus}"
        outcome.collectives = wrong if surplus else "fewer" if missing else "yes"
    except Exception as error:
        outcome.collectives = _said(error)
    if not run:
        return outcome
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FfjaxWarning)  # of a second signature: a state that settles
            got = results_of(step, case)
        outcome.run = "yes"
    except Exception as error:
        outcome.run = _said(error)
        return outcome
    try:
        fresh = row.make()  # NNX objects have been trained, arguments may have been donated
        expected = results_of(unsharded(fresh), fresh)
        assert_same_numerics(_narrowed(got, row.compare_as), _narrowed(expected, row.compare_as))
        outcome.numerics = "yes"
    except AssertionError as error:
        outcome.numerics = str(error)
    return outcome


def _warnings(row: Idiom, warned: list[str]) -> str:
    """`yes` if exactly the expected warning was given; that the batch is not split is not checked here."""
    others = [w for w in warned if "the batch is not split" not in w]
    if row.warns:
        return "yes" if len(others) == 1 and row.warns in others[0] else f"should warn of {row.warns!r}: {others}"
    return f"warns: {others}" if others else "yes"


def _narrowed(tree: Any, dtype: str) -> Any:
    def leaf(value: Any) -> Any:
        wide = dtype and jnp.issubdtype(jnp.result_type(value), jnp.floating)
        return jnp.asarray(value, dtype) if wide else value

    return jax.tree.map(leaf, tree)


def _said(error: Exception) -> str:
    """The error and the innermost line of it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {str(error)[:600]} [{pathlib.Path(frame.filename).name}:{frame.lineno}]"
