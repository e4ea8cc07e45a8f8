"""The search: all named strategies and the free space, on all meshes that make sense, within a memory budget.

1. Every named strategy that has a use for a mesh is solved on every mesh; restricted problems are small.
2. On the meshes where they did best the free problem is solved to a proved gap (`methods/solver.py`), from where they
   ended; then, where links are of two levels, on a mesh of three axes that cuts those of the best plan. A sum of costs
   sees no overlap, so where collectives run beside kernels it is solved for several guesses of how much is hidden
   (`overlap`).
3. What does not fit is solved again with a price on memory (`priced_memory`), which also finds what budget would do.
4. Solutions are simulated, and the fastest that fits is refined over the simulator (`methods/refinement.py`): never
   worse than the best named strategy.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ffjax.cost.cluster import Cluster
from ffjax.cost.kernels import Kernel
from ffjax.ir.regions import Regions
from ffjax.ir.spec import MeshShape, parts_of
from ffjax.strategies.base import Strategy, all_strategies, named
from ffjax.strategies.budget import scheduled_peak
from ffjax.strategies.candidates import Keep
from ffjax.strategies.methods.decomposition import GAP
from ffjax.strategies.roles import lacking
from ffjax.strategies.session import AUTO, Found, Session

MOST_AXES = 2
"""Of the meshes on which strategies are tried when none is given; those of the best plan may be cut into one more."""
FREE_MESHES = 3
"""On how many meshes, beside the one with a single axis, the free problem is solved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """`best` is the fastest that fits, or, where nothing does, the one that needs least memory."""

    best: Found
    found: tuple[Found, ...]
    seconds: dict[str, float]
    keys: tuple[str, ...]
    """The family of each region."""
    kernels: tuple[Kernel, ...]
    unused: dict[str, str]
    """Strategies that found nothing, and why."""
    session: Session
    """What further solves share with these."""


Progress = Callable[[str, float], None]
"""Told what is being solved, and the share of the work that is done."""


def search(
    regions: Regions,
    cluster: Cluster,
    *,
    budget_bytes: float,
    strategy: str = AUTO,
    meshes: Sequence[MeshShape] | None = None,
    keep: Callable[[MeshShape], Keep | None] | None = None,
    marks: Mapping[int, str] | None = None,
    progress: Progress | None = None,
) -> SearchResult:
    """Finds the fastest plan that fits.

    Args:
      regions: the program.
      cluster: where it runs.
      budget_bytes: what one device may hold.
      strategy: `"auto"`, or a named strategy that alone is searched.
      meshes: those to consider; by default the cluster's.
      keep: for a mesh, which candidates pins leave.
      marks: for each pinned region what it is pinned to: those pinned otherwise are decided apart.
      progress: is told what is being done.

    Raises:
      ValueError: for an unknown strategy, or one that has no use for any of the meshes.
    """
    began = time.perf_counter()
    search_ = Session(regions, cluster, budget_bytes, keep, marks)
    analysed = time.perf_counter()
    strategies = all_strategies() if strategy == AUTO else (named(strategy),)
    given = meshes is not None
    if meshes is None:
        meshes = cluster.mesh_shapes(max_axes=MOST_AXES)
        tried = {s.name: _natural(s, meshes) for s in strategies}
    else:
        tried = {s.name: list(meshes) for s in strategies}
    pairs = [(s, m, roles) for m in meshes for s in strategies if m in tried[s.name] and (roles := s.on(m)) is not None]
    if not pairs and strategy != AUTO:
        raise ValueError(
            f"strategy {strategy!r} has no use for the meshes {', '.join(map(str, meshes))}; give it one with more axes"
        )
    lacks = {s.name: lacking(search_.usage, roles) for s, _, roles in pairs}
    pairs = [pair for pair in pairs if not lacks[pair[0].name]]
    if not pairs and strategy != AUTO:
        raise ValueError(f"strategy {strategy!r} is for programs that have {lacks[strategy]}; take another one")
    found: list[Found] = []
    for done, (entry, mesh, roles) in enumerate(pairs):
        if progress:
            progress(f"{entry.name} on {mesh}", 0.5 * done / len(pairs))
        found += search_.restricted(entry, mesh, roles, alone=strategy != AUTO)
    restricted = time.perf_counter()
    if strategy == AUTO:
        chosen = _promising(found, meshes)
        for done, mesh in enumerate(chosen):
            if progress:
                progress(f"free search on {mesh}", 0.5 + 0.5 * done / len(chosen))
            found += search_.free(mesh, [f for f in found if f.mesh == mesh])
        if not given and (finer := _finer(cluster, found)) is not None:
            if progress:
                progress(f"free search on {finer[0]}", 1.0)
            found += search_.finer(*finer)
    solved = time.perf_counter()
    if strategy == AUTO and cluster.async_collectives:
        if progress:
            progress("refinement", 1.0)
        found += search_.refined(found)
    if not found:
        raise ValueError(f"no candidate is left for strategy {strategy!r} on any mesh; loosen the pins")
    fitting = [f for f in found if f.fits]
    ranked = sorted(fitting, key=lambda f: f.predicted_s)
    best = next(
        (f for f in ranked if scheduled_peak(f.layout, budget_bytes, search_.memory).bytes <= budget_bytes), None
    )
    best = best or min(found, key=lambda f: f.peak.bytes)
    free = next((f for f in found if f.strategy == AUTO and f.mesh == best.mesh), None)
    if best.strategy == AUTO and best.bound_within is not None and best.gap > GAP:
        best = dataclasses.replace(best, bound_s=max(best.bound_s, min(best.bound_within(), best.objective_s)))
    if best.strategy != AUTO and free is not None:
        # What was proved of the strategy alone is little: what counts is the whole space.
        best = dataclasses.replace(best, objective_s=best.step_s, bound_s=min(free.bound_s, best.step_s))
    own = search_.memory.under(best.layout).peak(best.layout)
    fits = own.bytes <= budget_bytes
    found = [dataclasses.replace(f, peak=own, fits=fits) if f.layout is best.layout else f for f in found]
    best = dataclasses.replace(best, peak=own, fits=fits)
    finished = time.perf_counter()
    seconds = {
        "analyse": analysed - began,
        "named strategies": restricted - analysed,
        "free search": solved - restricted,
        "refine": finished - solved,
    }
    return SearchResult(
        best=best,
        found=tuple(found),
        seconds=seconds,
        keys=tuple(search_.keys),
        kernels=tuple(search_.kernels),
        unused={s.name: _why_unused(s, lacks, pairs) for s in strategies if s.name not in {f.strategy for f in found}},
        session=search_,
    )


def _why_unused(strategy: Strategy, lacks: Mapping[str, str], pairs: Sequence[tuple[Strategy, object, object]]) -> str:
    if lack := lacks.get(strategy.name):
        return f"is for programs that have {lack}"
    if any(entry is strategy for entry, *_ in pairs):
        return "has no candidates left: loosen the pins"
    return "has no use for these meshes: it needs other axes"


def _natural(strategy: Strategy, meshes: Sequence[MeshShape]) -> list[MeshShape]:
    """Where an expert would try a strategy: all meshes if its axes differ in role, else the simplest of each rank."""
    if any(len(set(roles)) > 1 for m in meshes if (roles := strategy.on(m)) is not None):
        return list(meshes)
    return list({len(m.axes): m for m in reversed(meshes)}.values())


def _promising(found: Sequence[Found], meshes: Sequence[MeshShape]) -> list[MeshShape]:
    """The meshes on which a named strategy did best, and every mesh of one axis."""

    def score(mesh: MeshShape) -> tuple[bool, float]:
        here = [f for f in found if f.mesh == mesh]
        return min(((not f.fits, f.predicted_s) for f in here), default=(True, float("inf")))

    ranked = sorted(meshes, key=score)
    single = [m for m in meshes if len(m.axes) == 1]
    return list(dict.fromkeys([m for m in ranked if len(m.axes) > 1][:FREE_MESHES] + single))


def _finer(cluster: Cluster, found: Sequence[Found]) -> tuple[MeshShape, Found] | None:
    """A mesh of three axes to try, and the fastest plan on a mesh of two that it cuts; None on one level of links."""
    if cluster.hosts == 1 or cluster.devices_per_host == 1:
        return None
    base = min(
        (f for f in found if f.fits and len(f.mesh.axes) == MOST_AXES), key=lambda f: f.predicted_s, default=None
    )
    if base is None:
        return None
    cuts = [m for m in cluster.mesh_shapes(MOST_AXES + 1) if len(m.axes) > MOST_AXES and parts_of(base.mesh, m)]
    return (cuts[0], base) if cuts else None
