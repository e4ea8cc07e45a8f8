"""From what the search found to a plan: what was decided and predicted, written down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jax.sharding import PartitionSpec

from ffjax.cost.cluster import Cluster
from ffjax.cost.collectives import CollectiveModel
from ffjax.cost.estimate import estimate
from ffjax.cost.simulation.limits import MoreMemory, limits_of
from ffjax.ir.assignment import UNUSED, Assignment
from ffjax.ir.regions import Regions
from ffjax.ir.rules import factor_name
from ffjax.ir.spec import MeshShape, Spec
from ffjax.ir.trace import Program
from ffjax.plan import Plan
from ffjax.plan_record import Competitor, Decision, Placement, SearchReport
from ffjax.planning.fingerprint import fingerprint
from ffjax.planning.pins import entries
from ffjax.strategies.families import members
from ffjax.strategies.problem import total_seconds
from ffjax.strategies.runner_up import RunnerUp, runners_up
from ffjax.strategies.search import SearchResult
from ffjax.strategies.session import AUTO, Found

_MOST_LARGER = 4
"""Plans that do not fit, the fastest if nothing overlapped, that are simulated to say what more memory would change."""


def plan_of(
    program: Program,
    regions: Regions,
    cluster: Cluster,
    result: SearchResult,
    best: Found,
    budget: float,
    strategy: str,
    pins: Mapping[str, PartitionSpec],
    seconds: dict[str, float],
    *,
    kept: Mapping[str, Spec],
    marked: bool,
) -> Plan:
    """A search's finding as a plan; `marked`: whether regions were told apart by what is pinned or kept."""
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
        fingerprint=fingerprint(regions, None if marked else result.keys),
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
        estimate=estimate(layout, result.kernels, model, best.peak, best.simulated, result.keys),
        search=_search_report(result, best, seconds),
        limits=limits_of(result.session.simulator(best.mesh), layout.assignments, _more_memory(result, best)),
        profile="" if cluster.profile is None else f"{cluster.profile.name} {cluster.profile.digest}",
        remat=program.remat,
        kept=dict(kept),
        keeps_constraints=bool(program.constraints),
        layout=layout,
        described=cluster,
    )


def _more_memory(result: SearchResult, best: Found) -> MoreMemory | None:
    """The fastest plan known that does not fit, and what a byte cost in the solves for this plan's mesh."""
    session = result.session
    larger = [(f.step_s, f.layout, f.peak.bytes) for f in result.found if not f.fits]
    larger += [
        (total_seconds(f.problem, f.free.solution.choice), f.free.layout, f.free.peak.bytes)
        for f in result.found
        if f.free is not None and f.strategy in (AUTO, best.strategy)
    ]
    faster = [
        (seconds, size)
        for sum_s, layout, size in sorted(larger, key=lambda one: one[0])[:_MOST_LARGER]
        if (seconds := session.simulated(layout).step_s if session.cluster.async_collectives else sum_s)
        < best.predicted_s
        and size > best.peak.bytes
    ]
    if not faster:
        return None
    step_s, size = min(faster)
    paid = [f for f in result.found if f.mesh == best.mesh and f.fits and f.strategy in (AUTO, best.strategy)]
    s_per_byte = min(paid, key=lambda f: f.predicted_s, default=best).s_per_byte
    if not s_per_byte:
        s_per_byte = (best.predicted_s - step_s) / (size - best.peak.bytes)
    return MoreMemory(saved_s_per_gib=s_per_byte * 2**30, peak_bytes=size, step_s=step_s)


def _decisions(regions: Regions, best: Found, keys: Sequence[str], others: Sequence[RunnerUp | None]) -> list[Decision]:
    families = members(keys)
    decisions = []
    for node, choice, other in zip(best.problem.nodes, best.choice, others, strict=True):
        region = regions.regions[node.regions[0]]
        if not region.sizes:
            continue
        names = [factor_name(i) for i in range(len(region.sizes))]
        split, scatter = _describe(node.candidates[choice], names, best.mesh)
        runner_up = "" if other is None else _text(*_describe(node.candidates[other.candidate], names, best.mesh))
        where, what = regions.subject(region)
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


def _search_report(result: SearchResult, best: Found, seconds: dict[str, float]) -> SearchReport:
    return SearchReport(
        seconds={**seconds, "total": sum(seconds.values())},
        algorithm=f"{best.algorithm}, {best.strategy}",
        candidates=sum(len(n.candidates) for n in best.problem.nodes),
        lower_bound_s=best.bound_s,
        gap=best.gap,
        stop="proved optimal for its mesh" if best.gap <= 1e-3 else "no move improved",
        competitors=tuple(
            Competitor(
                strategy=f.strategy, mesh=str(f.mesh), step_s=f.predicted_s, peak_bytes=f.peak.bytes, fits=f.fits
            )
            for f in result.found
        ),
    )
