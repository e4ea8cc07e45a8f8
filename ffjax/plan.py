"""The plan: what was decided, as data that a person can review, diff, pin and commit.

A plan is stable JSON text. Its decisions are keyed by families of alike regions, each with the source line of its first
op, so an unrolled network of any depth has a plan of the same length. A plan made or loaded here can be printed and
compared anywhere; to be lowered it must be bound to the program that it was made for (`ffjax.plan` does so, a loaded
one is bound by `plan.bind` or by passing it to `ffjax.autoshard`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import jax
from jax.sharding import PartitionSpec

from ffjax.arguments import Names, Numbers
from ffjax.cost.cluster import Cluster
from ffjax.cost.estimate import Estimate
from ffjax.cost.profiles.files import replace_file
from ffjax.cost.simulation.limits import Limits
from ffjax.cost.simulation.timeline import Timeline
from ffjax.emit.emit import partition_spec
from ffjax.errors import PlanError, PlanMismatch
from ffjax.ir.assignment import UNUSED, Assignment
from ffjax.ir.compat import AS_WRITTEN
from ffjax.ir.layout import Layout
from ffjax.ir.spec import MeshShape, Spec
from ffjax.ir.trace import Program
from ffjax.plain import from_plain, to_plain

if TYPE_CHECKING:
    from ffjax.verifying import Verification

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
class Plan:
    """A sharding plan for one program on one mesh. Make one with `ffjax.plan`, read one with `Plan.load`."""

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
    """Arguments that came sharded and stay so, by path; see `ffjax.kept`."""
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
    def in_specs(self) -> Any:
        """PartitionSpecs shaped like the arguments: `(args, kwargs)`; by path where the plan is not bound."""
        return self._tree(self.args, None if self.layout is None else self._program.in_tree)

    @property
    def out_specs(self) -> Any:
        """PartitionSpecs shaped like the results; by path where the plan is not bound."""
        return self._tree(self.results, None if self.layout is None else self._program.out_tree)

    def _tree(self, placements: Sequence[Placement], tree: Any) -> Any:
        specs = {p.path: partition_spec(p.spec) for p in placements}
        return specs if tree is None else jax.tree.unflatten(tree, list(specs.values()))

    @property
    def _program(self) -> Program:
        return self.bound.graph.program

    @property
    def bound(self) -> Layout:
        """The plan on its program; raises PlanError for a plan that is not bound."""
        if self.layout is None:
            raise PlanError(
                f"the plan of {self.program!r} was loaded and is not bound to a program. Remedy: "
                "plan.bind(step, *args), or ffjax.autoshard(step, plan=plan)."
            )
        return self.layout

    def spec(self, path: str) -> PartitionSpec:
        """The PartitionSpec of one argument or result, by its path (`state/params/dense/kernel`)."""
        for placement in self.args + self.results:
            if placement.path == path:
                return partition_spec(placement.spec)
        raise PlanError(
            f"the plan has no argument or result {path!r}; it has {', '.join(p.path for p in self.args[:8])}, ..."
        )

    def bind(
        self,
        step: Any,
        *args: Any,
        static_argnums: Numbers = None,
        static_argnames: Names = None,
        donate_argnums: Numbers = None,
        donate_argnames: Names = None,
        **kwargs: Any,
    ) -> Plan:
        """This plan on a program: traces `step` and checks that it is the one that the plan was made for."""
        from ffjax.planner import bind_program, trace_step

        program = trace_step(
            step,
            args,
            kwargs,
            static_argnums=static_argnums,
            static_argnames=static_argnames,
            donate_argnums=donate_argnums,
            donate_argnames=donate_argnames,
            remat=self.remat,
        )
        return bind_program(self, program)

    def lower(self, devices: Sequence[Any] | None = None) -> jax.stages.Lowered:
        """Lowers the sharded step: for `devices`, or, without any, for a mesh that need not exist."""
        from ffjax.emit.run import lower

        return lower(self.bound, devices)

    def simulate(self, cluster: Cluster | None = None) -> Timeline:
        """Simulates a step on one device: every kernel and collective, what overlaps, and memory over time.

        `cluster`: by default the one that the plan was made for; a loaded plan finds it if it is a shipped one.
        Raises PlanError for a plan that is not bound, or whose cluster is not known or is another.
        """
        from ffjax.simulating import simulate_plan

        return simulate_plan(self, cluster)

    def verify(self, cluster: Cluster | None = None, devices: Sequence[jax.Device] | None = None) -> Verification:
        """Compiles the plan, and puts what was predicted beside what the compiler made of it.

        Args:
          cluster: by default the one that the plan was made for; a loaded plan finds it if it is a shipped one.
          devices: to compile for; by default those here if they are the cluster's, else compile-only ones.

        Raises:
          PlanError: for a plan that is not bound, or whose cluster is not known or is another.
          ClusterError: where there are no devices to compile for.
        """
        from ffjax.simulating import cluster_of_plan
        from ffjax.verifying import verify

        return verify(self, cluster_of_plan(self, cluster), devices)

    def place_state(
        self,
        state: Any,
        argument: str | None = None,
        *,
        devices: Sequence[jax.Device] | None = None,
        donate: bool = False,
    ) -> Any:
        """A live state moved to where this plan wants it, on the first of `devices` (by default all).

        Needs no program: a loaded plan will do. See `place_state` of an autosharded step.
        """
        from ffjax.state import Places

        return Places(self, devices or jax.devices()).place_state(state, argument, donate=donate)

    def abstract_state(
        self, state: Any, argument: str | None = None, *, devices: Sequence[jax.Device] | None = None
    ) -> Any:
        """Shapes, dtypes and shardings of a state under this plan; see `abstract_state` of an autosharded step."""
        from ffjax.state import Places

        return Places(self, devices or jax.devices()).abstract_state(state, argument)

    def explain(self, details: bool = False) -> str:
        """Why: what is sharded how, what it costs, and what the runner-up would have cost."""
        from ffjax.explain import explain

        return explain(self, details=details)

    def diff(self, other: Plan) -> str:
        """The differences to another plan, one line each; empty if there is none."""
        from ffjax.explain import diff

        return diff(self, other)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan as JSON; a reader never sees half a file."""
        replace_file(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
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
    def from_json(cls, text: str, source: str = "text") -> Plan:
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
