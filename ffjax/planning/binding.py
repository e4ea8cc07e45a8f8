"""A saved plan on a program: whether it is the one that the plan was made for, and how that is sharded then."""

from __future__ import annotations

from ffjax.emit.emit import partition_spec
from ffjax.errors import PlanError, PlanMismatch
from ffjax.ir.assignment import UNUSED, Assignment
from ffjax.ir.graph import build_graph
from ffjax.ir.layout import Layout
from ffjax.ir.regions import find_regions
from ffjax.ir.spec import Spec, format_spec
from ffjax.ir.trace import Program
from ffjax.plan_record import PlanRecord
from ffjax.planning.fingerprint import fingerprint
from ffjax.planning.kept import as_planned, wanted_by
from ffjax.planning.pins import Wanted, pin_marks, pinned_specs
from ffjax.strategies.candidates import is_candidate
from ffjax.strategies.families import family_keys, members


def bound_layout(plan: PlanRecord, program: Program) -> Layout:
    """A plan on a program that is traced under its policy; raises PlanMismatch that says how another differs."""
    for ours, theirs in zip(program.args, plan.args, strict=False):
        if (ours.path, ours.shape, ours.dtype) != (theirs.path, theirs.shape, theirs.dtype):
            raise PlanMismatch(
                f"the plan of {plan.program!r} was made for {theirs.path}: {theirs.dtype}{list(theirs.shape)}, but the "
                f"argument is {ours.path}: {ours.dtype}{list(ours.shape)}. Remedy: search a plan for these arguments."
            )
    if program.remat != plan.remat:
        raise PlanMismatch(
            f"the plan of {plan.program!r} was made with remat={plan.remat!r}, but the program was traced with "
            f"remat={program.remat!r}. Remedy: plan.bind(step, *args), which traces it as the plan wants."
        )
    program = as_planned(program, plan)
    regions = find_regions(build_graph(program))
    plan.check_fingerprint(fingerprint(regions), program.name)
    wanted: Wanted = pinned_specs(regions, {pattern: partition_spec(spec) for pattern, spec in plan.pins.items()})
    if plan.kept or program.constraints:
        wanted, _ = wanted_by(regions, plan.kept, plan.mesh, wanted)
    keys = family_keys(regions, pin_marks(regions, wanted))
    found = {d.key: d.assignment(plan.mesh) for d in plan.decisions}
    nothing = Assignment((UNUSED,) * len(plan.mesh.axes), (UNUSED,) * len(plan.mesh.axes))
    for key, family in members(keys).items():
        first = regions.regions[family[0]]
        chosen = found.setdefault(key, nothing) if not first.sizes else found.get(key)
        if chosen is None or not is_candidate(regions, first, chosen, plan.mesh):
            where, what = regions.subject(first)
            fault = "no" if chosen is None else "an impossible"
            raise PlanError(
                f"the plan of {plan.program!r} has {fault} decision for {what} at {where} (key {key!r}). Remedy: "
                "restore the plan's file, or search the plan again; pins= changes a plan."
            )
    layout = Layout(regions=regions, mesh=plan.mesh, assignments=[found[k] for k in keys], axis_prices=plan.axis_prices)
    for placement, spec in zip(plan.args, _argument_specs(layout), strict=True):
        if placement.spec != spec:
            raise PlanError(
                f"the plan of {plan.program!r} says that {placement.path} is {format_spec(placement.spec)}, but by its "
                f"decisions it is {format_spec(spec)}. Remedy: restore the plan's file; pins= changes a plan."
            )
    return layout


def _argument_specs(layout: Layout) -> list[Spec]:
    """How the leaves of the arguments are sharded."""
    graph = layout.graph
    return [layout.home(graph.ops[op].results[0]) for op in graph.arguments[len(graph.program.closures) :]]
