"""The plan: what was decided, as data that a person can review, diff, pin and commit.

A plan is stable JSON text. Its decisions are keyed by families of alike regions, each with the source line of its first
op, so an unrolled network of any depth has a plan of the same length. A plan made or loaded here can be printed and
compared anywhere; to be lowered it must be bound to the program that it was made for (`ffjax.plan` does so, a loaded
one is bound by `plan.bind` or by passing it to `ffjax.autoshard`).
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from jax.sharding import PartitionSpec

from ffjax.cost.estimate import CollectiveTotal, Estimate
from ffjax.emit.emit import partition_spec
from ffjax.errors import PlanError, PlanMismatch
from ffjax.ir.assignment import UNUSED, Assignment
from ffjax.ir.layout import Layout
from ffjax.ir.spec import MeshShape, Spec
from ffjax.ir.trace import Program

FORMAT = 1


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
class SearchReport:
    """How the plan was found. `lower_bound_s` is proved for the plan's mesh; `gap` is the share above it."""

    seconds: dict[str, float]
    algorithm: str
    candidates: int
    lower_bound_s: float
    gap: float
    stop: str
    competitors: tuple[Competitor, ...]


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
    layout: Layout | None = field(default=None, compare=False, repr=False)
    """The plan on its program; None for a loaded plan that is not bound yet."""

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
        static_argnums: int | Sequence[int] = (),
        donate_argnums: int | Sequence[int] = (),
        **kwargs: Any,
    ) -> Plan:
        """This plan on a program: traces `step` and checks that it is the one that the plan was made for."""
        from ffjax.planner import bind_program, trace_step

        program = trace_step(step, args, kwargs, static_argnums=static_argnums, donate_argnums=donate_argnums)
        return bind_program(self, program)

    def lower(self, devices: Sequence[Any] | None = None) -> jax.stages.Lowered:
        """Lowers the sharded step: for `devices`, or, without any, for a mesh that need not exist."""
        from ffjax.emit.run import lower

        return lower(self.bound, devices)

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
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=target.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
            file.write(self.to_json())
        os.chmod(file.name, 0o644)  # temporary files are private
        os.replace(file.name, target)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Reads a plan; raises PlanError that names the file if it is missing, damaged or of another format."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise PlanError(
                f"cannot read the plan {os.fspath(path)!r}: {error.strerror}. Remedy: check the path."
            ) from error
        return cls.from_json(text, source=os.fspath(path))

    def to_json(self) -> str:
        content = {"format": FORMAT, **_plain(self)}
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "text") -> Plan:
        try:
            content = json.loads(text)
            if content.get("format") != FORMAT:
                raise PlanError(
                    f"the plan {source!r} has format {content.get('format')!r}, this ffjax reads {FORMAT}. "
                    "Remedy: search it again."
                )
            return _read(content)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, PlanError):
                raise
            raise PlanError(
                f"the plan {source!r} is damaged ({type(error).__name__}: {error}). "
                "Remedy: restore the file, or search the plan again."
            ) from error

    def check_fingerprint(self, fingerprint: str, program: str) -> None:
        """Raises PlanMismatch unless the plan was made for this program."""
        if fingerprint != self.fingerprint:
            raise PlanMismatch(
                f"the plan was made for {self.program!r} (fingerprint {self.fingerprint}), not for this {program!r} "
                f"({fingerprint}): its ops, shapes or dtypes differ. Remedy: search a new plan, or restore the program."
            )


def _plain(value: Any) -> Any:
    """Dataclasses as JSON objects, without the layout."""
    if isinstance(value, MeshShape):
        return value.as_dict()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.name != "layout"}
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    return value


def _read(content: dict[str, Any]) -> Plan:
    def placement(entry: dict[str, Any]) -> Placement:
        spec = tuple(tuple(dim) for dim in entry["spec"])
        return Placement(path=entry["path"], shape=tuple(entry["shape"]), dtype=entry["dtype"], spec=spec)

    rest = dict(content)
    del rest["format"]
    figures, report = rest.pop("estimate"), rest.pop("search")
    totals = tuple(CollectiveTotal(**{**c, "axes": tuple(c["axes"])}) for c in figures.pop("collectives"))
    largest = tuple((str(what), float(size)) for what, size in figures.pop("largest"))
    competitors = tuple(Competitor(**c) for c in report.pop("competitors"))
    mesh = rest.pop("mesh")
    return Plan(
        **{
            **rest,
            "mesh": MeshShape(tuple(mesh), tuple(mesh.values())),
            "axis_prices": tuple(rest["axis_prices"]),
            "args": tuple(placement(e) for e in rest["args"]),
            "results": tuple(placement(e) for e in rest["results"]),
            "closures": tuple(placement(e) for e in rest["closures"]),
            "decisions": tuple(Decision(**d) for d in rest["decisions"]),
            "estimate": Estimate(**figures, collectives=totals, largest=largest),
            "search": SearchReport(**report, competitors=competitors),
        }
    )
