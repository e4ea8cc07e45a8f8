"""From a step and its arguments to a plan: trace, analyse, search, report."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax.sharding import PartitionSpec

from ffjax import nnx
from ffjax.cost.cluster import Cluster, parse_bytes
from ffjax.cost.collectives import CollectiveModel
from ffjax.cost.estimate import estimate
from ffjax.emit.emit import partition_spec
from ffjax.errors import PinError, PlanError, PlanMismatch
from ffjax.inputs import argnums, cluster_of, mesh_of, over_budget, warn_if_batch_is_whole
from ffjax.ir.assignment import UNUSED, Assignment
from ffjax.ir.graph import Graph, Op, build_graph
from ffjax.ir.layout import Layout
from ffjax.ir.regions import Region, Regions, find_regions
from ffjax.ir.rules import factor_name
from ffjax.ir.spec import MeshShape, Spec, format_spec
from ffjax.ir.trace import Program, trace
from ffjax.pins import check_pins, entries, keep_pins, pin_marks
from ffjax.plan import Competitor, Decision, Placement, Plan, SearchReport
from ffjax.strategies.candidates import is_candidate
from ffjax.strategies.families import family_keys, members
from ffjax.strategies.runner_up import RunnerUp, runners_up
from ffjax.strategies.search import AUTO, MOST_AXES, Found, Progress, SearchResult, search

Pins = Mapping[str, PartitionSpec]


def plan(
    step: Callable[..., Any],
    *args: Any,
    cluster: Cluster | None = None,
    memory: str | float | None = None,
    strategy: str = AUTO,
    mesh: Mapping[str, int] | None = None,
    pins: Pins | None = None,
    static_argnums: int | Sequence[int] = (),
    donate_argnums: int | Sequence[int] = (),
    progress: Progress | None = None,
    **kwargs: Any,
) -> Plan:
    """Searches a plan for one step. Needs no devices: arguments may be `jax.ShapeDtypeStruct`.

    Args:
      step: a function as `jax.jit` takes it, or one that mutates NNX modules, as `nnx.jit` takes it.
      args, kwargs: its arguments, arrays or shapes.
      cluster: where it shall run; by default the devices that JAX sees.
      memory: bytes that one device may hold (`"70GiB"` or a number); by default all that it has.
      strategy: `"auto"`, or a named strategy.
      mesh: axis names and sizes, to be used as they are; by default meshes are searched too.
      pins: path patterns of arguments, and the PartitionSpec that each shall have.
      static_argnums, donate_argnums: as in `jax.jit`.
      progress: called with what is being done and the share that is done.

    Raises:
      TraceError, ClusterError, PinError, BudgetError, PlanError: each names the input and the remedy.
    """
    began = time.perf_counter()
    program = trace_step(step, args, kwargs, static_argnums=static_argnums, donate_argnums=donate_argnums)
    return plan_program(
        program,
        cluster=cluster,
        memory=memory,
        strategy=strategy,
        mesh=mesh,
        pins=pins,
        progress=progress,
        trace_s=time.perf_counter() - began,
    )


def trace_step(
    step: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    *,
    static_argnums: int | Sequence[int] = (),
    donate_argnums: int | Sequence[int] = (),
) -> Program:
    """Traces a step; one that takes NNX objects is made a function of their state first."""
    static = argnums(static_argnums, len(args), "static_argnums")
    donated = argnums(donate_argnums, len(args), "donate_argnums")
    return trace_call(nnx.as_function(step, args, kwargs, static, donated))


def trace_call(call: nnx.Call) -> Program:
    """Traces a call that is a function of arrays already."""
    return trace(
        call.step, call.args, call.kwargs, static_argnums=call.static_argnums, donate_argnums=call.donate_argnums
    )


def plan_program(
    program: Program,
    *,
    cluster: Cluster | None = None,
    memory: str | float | None = None,
    strategy: str = AUTO,
    mesh: Mapping[str, int] | None = None,
    pins: Pins | None = None,
    progress: Progress | None = None,
    trace_s: float = 0.0,
) -> Plan:
    """Searches a plan for a program that is traced already; see `plan`."""
    began = time.perf_counter()
    cluster = cluster_of(cluster)
    budget = float(cluster.device.memory_bytes if memory is None else parse_bytes(memory))
    meshes = None if mesh is None else [mesh_of(mesh, cluster)]
    graph = build_graph(program)
    regions = find_regions(graph)
    if pins:
        check_pins(regions, pins, meshes or cluster.mesh_shapes(max_axes=MOST_AXES))
    analysed = time.perf_counter()
    try:
        result = search(
            regions,
            cluster,
            budget_bytes=budget,
            strategy=strategy,
            meshes=meshes,
            keep=keep_pins(regions, pins or {}),
            marks=pin_marks(regions, pins or {}),
            progress=progress,
        )
    except ValueError as error:
        raise (PinError if pins else PlanError)(f"{program.name}: {error}") from error
    if not result.best.fits:
        raise over_budget(result, budget, cluster)
    warn_if_batch_is_whole(regions, result)
    seconds = {"trace": trace_s, "rules": analysed - began, **result.seconds}
    return _report(program, regions, cluster, result, budget, strategy, pins or {}, seconds)


def bind_program(plan: Plan, program: Program) -> Plan:
    """A plan on a program; raises PlanMismatch that says what differs if it was made for another."""
    for ours, theirs in zip(program.args, plan.args, strict=False):
        if (ours.path, ours.shape, ours.dtype) != (theirs.path, theirs.shape, theirs.dtype):
            raise PlanMismatch(
                f"the plan of {plan.program!r} was made for {theirs.path}: {theirs.dtype}{list(theirs.shape)}, but the "
                f"argument is {ours.path}: {ours.dtype}{list(ours.shape)}. Remedy: search a plan for these arguments."
            )
    regions = find_regions(build_graph(program))
    plan.check_fingerprint(fingerprint(regions), program.name)
    marks = pin_marks(regions, {pattern: partition_spec(spec) for pattern, spec in plan.pins.items()})
    keys = family_keys(regions, marks)
    found = {d.key: d.assignment(plan.mesh) for d in plan.decisions}
    nothing = Assignment((UNUSED,) * len(plan.mesh.axes), (UNUSED,) * len(plan.mesh.axes))
    for key, family in members(keys).items():
        first = regions.regions[family[0]]
        chosen = found.setdefault(key, nothing) if not first.sizes else found.get(key)
        if chosen is None or not is_candidate(regions, first, chosen, plan.mesh):
            where, what = _subject(regions.graph, first)
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
    return dataclasses.replace(plan, layout=layout)


def _argument_specs(layout: Layout) -> list[Spec]:
    """How the leaves of the arguments are sharded."""
    graph = layout.graph
    return [layout.home(graph.ops[op].results[0]) for op in graph.arguments[len(graph.program.closures) :]]


def fingerprint(regions: Regions, keys: Sequence[str] | None = None) -> str:
    """A hash of what a plan depends on: the ops, shapes, dtypes and how they are connected."""
    digest = hashlib.blake2b(digest_size=12)
    for key in family_keys(regions) if keys is None else keys:
        digest.update(key.encode())
    for leaf in regions.graph.program.args + regions.graph.program.results:
        digest.update(str(leaf).encode())
    return digest.hexdigest()


def program_fingerprint(program: Program) -> str:
    """The fingerprint of a program that is not analysed yet."""
    return fingerprint(find_regions(build_graph(program)))


def _report(
    program: Program,
    regions: Regions,
    cluster: Cluster,
    result: SearchResult,
    budget: float,
    strategy: str,
    pins: Pins,
    seconds: dict[str, float],
) -> Plan:
    best = result.best
    layout = best.layout
    graph = regions.graph
    model = CollectiveModel(best.mesh, cluster)
    others = runners_up(best.problem, best.choice)
    closures = len(program.closures)

    def argument(position: int) -> Placement:
        op = graph.ops[graph.arguments[position]]
        value = graph.values[op.results[0]]
        return Placement(path=op.label, shape=value.shape, dtype=value.dtype, spec=layout.home(value.id))

    return Plan(
        program=program.name,
        fingerprint=fingerprint(regions, None if pins else result.keys),
        cluster=cluster.name,
        devices=cluster.devices,
        strategy=strategy,
        mesh=best.mesh,
        axis_prices=model.axis_prices,
        budget_bytes=budget,
        pins={pattern: entries(spec) for pattern, spec in pins.items()},
        args=tuple(argument(closures + i) for i in range(len(program.args))),
        closures=tuple(argument(i) for i in range(closures)),
        results=tuple(
            Placement(path=leaf.path, shape=leaf.shape, dtype=leaf.dtype, spec=layout.operand(op, 0))
            for leaf, op in zip(program.results, graph.outputs, strict=True)
        ),
        decisions=tuple(_decisions(regions, best, result.keys, others)),
        estimate=estimate(layout, result.kernels, model, best.peak),
        search=_search_report(result, strategy, seconds),
        profile="" if cluster.profile is None else f"{cluster.profile.name} {cluster.profile.digest}",
        layout=layout,
    )


def _decisions(regions: Regions, best: Found, keys: Sequence[str], others: Sequence[RunnerUp | None]) -> list[Decision]:
    graph = regions.graph
    families = members(keys)
    decisions = []
    for node, choice, other in zip(best.problem.nodes, best.choice, others, strict=True):
        region = regions.regions[node.regions[0]]
        if not region.sizes:
            continue
        names = [factor_name(i) for i in range(len(region.sizes))]
        split, scatter = _describe(node.candidates[choice], names, best.mesh)
        runner_up = "" if other is None else _text(*_describe(node.candidates[other.candidate], names, best.mesh))
        where, what = _subject(graph, region)
        decisions.append(
            Decision(
                key=node.key,
                where=where,
                what=what,
                members=len(families[node.key]),
                factors=dict(zip(names, region.sizes, strict=True)),
                split=split,
                scatter=scatter,
                seconds=float(node.cost_s[choice]),
                runner_up=runner_up,
                runner_up_extra_s=0.0 if other is None else other.extra_s,
            )
        )
    return decisions


def _describe(candidate: Assignment, names: Sequence[str], mesh: MeshShape) -> tuple[dict[str, str], dict[str, int]]:
    split = {a: names[atom] for a, atom in zip(mesh.axes, candidate.atoms, strict=True) if atom != UNUSED}
    scatter = {a: dim for a, dim in zip(mesh.axes, candidate.scatter, strict=True) if dim != UNUSED}
    return split, scatter


def _text(split: Mapping[str, str], scatter: Mapping[str, int]) -> str:
    parts = [f"{a}:{f}" + (f"->dim {scatter[a]}" if a in scatter else "") for a, f in split.items()]
    return " ".join(parts) or "whole"


def _subject(graph: Graph, region: Region) -> tuple[str, str]:
    """The source line (or the path, of an argument) and the kind of a region's largest op."""

    def size(op: Op) -> float:
        return max((graph.values[v].bytes for v in op.results), default=0.0)

    heaviest = max((graph.ops[i] for i in region.ops), key=size)
    if not heaviest.results:
        return heaviest.label, heaviest.kind
    value = graph.values[heaviest.results[0]]
    more = f" and {len(region.ops) - 1} more" if len(region.ops) > 1 else ""
    return graph.source(heaviest), f"{heaviest.kind} {value.dtype}{list(value.shape)}{more}"


def _search_report(result: SearchResult, strategy: str, seconds: dict[str, float]) -> SearchReport:
    best = result.best
    exact = best.exact
    return SearchReport(
        seconds={**seconds, "total": sum(seconds.values())},
        algorithm=("integer linear program" if exact else "integer linear programs in neighbourhoods")
        + f", {best.strategy}",
        candidates=sum(len(n.candidates) for n in best.problem.nodes),
        lower_bound_s=best.bound_s,
        gap=0.0 if best.step_s == 0 else (best.step_s - best.bound_s) / best.step_s,
        stop="proved optimal for its mesh"
        if exact and best.step_s - best.bound_s <= 1e-3 * best.step_s
        else "no move improved",
        competitors=tuple(
            Competitor(strategy=f.strategy, mesh=str(f.mesh), step_s=f.step_s, peak_bytes=f.peak.bytes, fits=f.fits)
            for f in result.found
        ),
    )
