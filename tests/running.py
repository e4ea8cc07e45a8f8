"""Running cases, sharded and not, and counting the collectives of programs: what tests of whole steps share."""

from __future__ import annotations

import dataclasses
import pathlib
import random
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from ffjax.cost.cluster import Cluster
from ffjax.cost.collectives import CollectiveModel
from ffjax.emit.emit import in_shardings
from ffjax.emit.run import device_mesh, jitted
from ffjax.ir.layout import Layout, PlannedCollective
from ffjax.ir.regions import Regions
from ffjax.ir.spec import CountedCollective, MeshShape
from ffjax.nnx import has_objects
from ffjax.placing import place
from ffjax.strategies.candidates import candidates
from ffjax.strategies.families import family_keys, members

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from programs import Case


def eager_cluster() -> Cluster:
    """Eight CPU devices so slow, over links so quick to start, that any sharding pays."""
    cluster = Cluster.named("cpu")
    device = cluster.device
    slow = dataclasses.replace(
        device,
        kernel_s=0.0,
        flops_per_s={k: v / 50 for k, v in device.flops_per_s.items()},
        vector_flops_per_s=device.vector_flops_per_s / 50,
        memory_bytes_per_s=device.memory_bytes_per_s / 50,
    )
    links = tuple(dataclasses.replace(link, latency_s=0.0) for link in cluster.links)
    # With reduce-scatters the cheaper of the two is also the one that is emitted; without, they tie.
    return dataclasses.replace(cluster, device=slow, links=links, reduce_scatter=True)


def results_of(step: Any, case: Case) -> list[Any]:
    """The results of one step, or of three where there is a state; with the arrays of NNX objects after each."""
    found, args = [], list(case.args)
    objects = has_objects(args)
    carries = (case.carries,) if isinstance(case.carries, int) else case.carries or ()
    for _ in range(3 if carries or objects else 1):
        out = step(*args, **case.kwargs)
        for index, new in zip(carries, out if type(out) is tuple else (out,), strict=False):
            args[index] = new
        made = (out, arrays_of(args)) if objects else out
        # The next step may donate what this one made.
        found.append(jax.tree.map(lambda v: v.copy() if isinstance(v, jax.Array) else v, made))
    return found


def arrays_of(objects: Any) -> Any:
    """The arrays of NNX modules, optimizers and metrics."""
    from flax import nnx

    return nnx.to_pure_dict(nnx.split(objects)[1])


def unsharded(case: Case) -> Any:
    """The step as its users run it on one device."""
    if has_objects(case.args):
        from flax import nnx

        return nnx.jit(case.step, static_argnums=case.static_argnums)
    return jax.jit(case.step, static_argnums=case.static_argnums)


def counted(
    found: Iterable[CountedCollective | PlannedCollective], *, own: bool = False
) -> Counter[tuple[str, tuple[str, ...], float]]:
    """How many there are of each; `own`: with those that the program itself spells out."""
    total: Counter[tuple[str, tuple[str, ...], float]] = Counter()
    for c in found:
        if own or not c.user:
            total[c.collective.kind, c.collective.axes, c.collective.bytes] += c.count
    return total


def bytes_by_kind(found: Iterable[CountedCollective | PlannedCollective]) -> Counter[str]:
    """Bytes of each kind; a reduce-scatter counts as an all-reduce."""
    total: Counter[str] = Counter()
    for (kind, _, size), count in counted(found).items():
        total["all_reduce" if kind == "reduce_scatter" else kind] += count * size
    return total


def drawn_layout(regions: Regions, mesh: MeshShape, seed: int) -> Layout:
    """A layout that takes any candidate for every family: one that no search would find."""
    keys = family_keys(regions)
    rng = random.Random(seed)
    choice = {
        key: rng.choice(candidates(regions, regions.regions[family[0]], mesh)) for key, family in members(keys).items()
    }
    prices = CollectiveModel(mesh, eager_cluster()).axis_prices
    return Layout(regions=regions, mesh=mesh, assignments=[choice[key] for key in keys], axis_prices=prices)


def run_layout(layout: Layout, flat: Sequence[Any]) -> tuple[jax.stages.Lowered, list[jax.Array]]:
    """Runs a program, given the arrays that it closes over and the leaves of its arguments, on the first devices."""
    devices = device_mesh(layout.mesh, jax.devices())
    placed = [place(x, s) for x, s in zip(flat, in_shardings(layout, devices), strict=True)]
    lowered = jitted(layout, devices, donate=False).trace(*placed).lower()
    return lowered, lowered.compile()(*placed)
