"""What a plan is as data: its fields, its text, and what makes a text a damaged one.

Stable JSON text. Its decisions are keyed by families of alike regions, each with the source line of its first op, so an
unrolled network of any depth has a plan of the same length.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self, cast

from ffjax.cost.cluster import Cluster
from ffjax.cost.estimate import Estimate
from ffjax.cost.profiles.files import replace_file
from ffjax.cost.simulation.limits import Limits
from ffjax.errors import PlanError, PlanMismatch
from ffjax.ir.assignment import UNUSED, Assignment
from ffjax.ir.compat import AS_WRITTEN
from ffjax.ir.layout import Layout
from ffjax.ir.spec import MeshShape, Spec
from ffjax.plain import from_plain, to_plain

FORMAT = 1
_LATER = {"optional": True}
"""Of fields that the format gained: texts from before lack them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """How one family of regions is sharded: `split` gives a mesh axis one of the family's factors."""

    key: str
    where: str
    what: str
    members: int
    factors: dict[str, int]
    split: dict[str, str]
    scatter: dict[str, int] = field(default_factory=dict)
    """For a mesh axis that splits a reduced factor: the result's dimension along which the sums are scattered."""
    seconds: float = 0.0
    runner_up: str = ""
    runner_up_extra_s: float = 0.0

    def assignment(self, mesh: MeshShape) -> Assignment:
        index = {name: i for i, name in enumerate(self.factors)}
        atoms = tuple(index[self.split[a]] if a in self.split else UNUSED for a in mesh.axes)
        return Assignment(atoms, tuple(self.scatter.get(a, UNUSED) for a in mesh.axes))


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """One argument or result: its path, what it is, and how it is sharded."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    spec: Spec


@dataclass(frozen=True, slots=True, kw_only=True)
class Competitor:
    """The best plan of one strategy on one mesh, as the search saw it."""

    strategy: str
    mesh: str
    step_s: float
    peak_bytes: float
    fits: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Finalist:
    """A plan that the search compiled before it decided: what was predicted, and what the compiler made of it."""

    strategy: str
    mesh: str
    step_s: float
    compiled_step_s: float
    peak_bytes: float
    compiled_peak_bytes: float
    fits: bool
    """Whether the compiled program is within the budget."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RematVariant:
    """The best plan of the step with its `jax.checkpoint` regions under one policy.

    The fastest that fits, or, where none does, the one that needs least memory.
    """

    policy: str
    strategy: str
    mesh: str
    step_s: float
    peak_bytes: float
    fits: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchReport:
    """How the plan was found. `lower_bound_s` is proved for all plans on its mesh; `gap` is the plan's share above it.

    Both are of the sum of costs that was minimised, in which a collective counts as far as it was taken to be exposed:
    of a plan that another solution's overlap led to, less than its whole seconds.
    """

    seconds: dict[str, float]
    algorithm: str
    candidates: int
    lower_bound_s: float
    gap: float
    stop: str
    competitors: tuple[Competitor, ...]
    finalists: tuple[Finalist, ...] = ()
    """Those that were compiled, fastest first as compiled; empty with `verify="never"`."""
    remat: tuple[RematVariant, ...] = field(default=(), metadata=_LATER)
    """What each policy would have cost, the one taken among them; empty where there was no choice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRecord:
    """What a plan decides, predicts and was found by, as it is saved; `ffjax.plan.Plan` can also do things with it."""

    program: str
    fingerprint: str
    cluster: str
    devices: int
    strategy: str
    mesh: MeshShape
    axis_prices: tuple[float, ...]
    budget_bytes: float
    pins: dict[str, Spec]
    """What the user fixed: patterns of argument paths, and how those are sharded."""
    args: tuple[Placement, ...]
    results: tuple[Placement, ...]
    closures: tuple[Placement, ...]
    decisions: tuple[Decision, ...]
    estimate: Estimate
    search: SearchReport
    profile: str = ""
    """The measurements that it was priced by: name and hash; empty if none were."""
    remat: str = field(default=AS_WRITTEN, metadata=_LATER)
    """The policy that its program's `jax.checkpoint` regions were traced under."""
    kept: dict[str, Spec] = field(default_factory=dict, metadata=_LATER)
    """Arguments that came sharded and stay so, by path; see `ffjax.planning.kept`."""
    keeps_constraints: bool = field(default=False, metadata=_LATER)
    """Whether sharding constraints of the program over the plan's mesh hold."""
    limits: Limits | None = field(default=None, metadata=_LATER)
    """What holds the step back; None in plans that were saved before this was known."""
    layout: Layout | None = field(default=None, compare=False, repr=False, metadata={"plain": False})
    """The plan on its program; None for a loaded plan that is not bound yet."""
    described: Cluster | None = field(default=None, compare=False, repr=False, metadata={"plain": False})
    """The cluster that it was planned for; None for a loaded plan, which knows its name only."""

    @property
    def mesh_shape(self) -> dict[str, int]:
        return self.mesh.as_dict()

    @property
    def bound(self) -> Layout:
        """The plan on its program; raises PlanError for a plan that is not bound."""
        if self.layout is None:
            raise PlanError(
                f"the plan of {self.program!r} was loaded and is not bound to a program. Remedy: "
                "plan.bind(step, *args), or ffjax.autoshard(step, plan=plan)."
            )
        return self.layout

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan as JSON; a reader never sees half a file."""
        replace_file(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads a plan; raises PlanError that names the file if it is missing, damaged or of another format."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise PlanError(
                f"the plan {os.fspath(path)!r} is damaged: {error}. Remedy: restore the file, or search the plan again."
            ) from error
        except OSError as error:
            raise PlanError(
                f"cannot read the plan {os.fspath(path)!r}: {error.strerror}. Remedy: check the path."
            ) from error
        return cls.from_json(text, source=os.fspath(path))

    def to_json(self) -> str:
        """The plan as text; equal plans have equal texts."""
        content = {"format": FORMAT, **cast(dict[str, object], to_plain(self))}
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "text") -> Self:
        """Reads a plan's text; raises PlanError that names the `source` and what is wrong with it."""
        try:
            content = json.loads(text)
            made = content.pop("format", None) if isinstance(content, dict) else None
            if made != FORMAT:
                raise PlanError(
                    f"the plan {source!r} has format {made!r}, this ffjax reads {FORMAT}. Remedy: search it again."
                )
            plan = from_plain(cls, content)
            plan._check()
        except ValueError as error:
            if isinstance(error, PlanError):
                raise
            raise PlanError(
                f"the plan {source!r} is damaged: {error}. Remedy: restore the file, or search the plan again."
            ) from error
        return plan

    def _check(self) -> None:
        """Raises ValueError where parts of the plan do not go together."""
        if self.mesh.devices != self.devices or min(self.mesh.sizes, default=1) < 1:
            raise ValueError(f"the mesh {self.mesh_shape} does not have the {self.devices} devices of the plan")
        if len(self.axis_prices) != len(self.mesh.axes):
            raise ValueError(f"axis_prices has {len(self.axis_prices)} entries for the mesh {self.mesh_shape}")
        for placement in self.args + self.results + self.closures:
            if len(placement.spec) != len(placement.shape):
                raise ValueError(f"{placement.path} has {len(placement.shape)} dimensions, its spec {placement.spec}")
            if unknown := {a for dim in placement.spec for a in dim} - set(self.mesh.axes):
                raise ValueError(f"the spec of {placement.path} names the axis {min(unknown)!r}, which the mesh lacks")
        if len({d.key for d in self.decisions}) != len(self.decisions):
            raise ValueError("two decisions have one key")
        for d in self.decisions:
            if unknown := (d.split.keys() | d.scatter.keys()) - set(self.mesh.axes):
                raise ValueError(f"the decision for {d.what} names the axis {min(unknown)!r}, which the mesh lacks")
            if unknown := set(d.split.values()) - d.factors.keys():
                raise ValueError(f"the decision for {d.what} splits {min(unknown)!r}, which is none of its factors")

    def check_fingerprint(self, fingerprint: str, program: str) -> None:
        """Raises PlanMismatch unless the plan was made for this program."""
        if fingerprint != self.fingerprint:
            raise PlanMismatch(
                f"the plan was made for {self.program!r} (fingerprint {self.fingerprint}), not for this {program!r} "
                f"({fingerprint}): its ops, shapes or dtypes differ. Remedy: search a new plan, or restore the program."
            )
