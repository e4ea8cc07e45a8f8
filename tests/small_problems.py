"""Random programs of a few ops, whose search problems are small enough to try every choice."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st

from ffjax.cost.cluster import Cluster
from ffjax.cost.collectives import CollectiveModel
from ffjax.cost.kernels import by_family, kernels
from ffjax.ir.graph import build_graph
from ffjax.ir.regions import Regions, find_regions
from ffjax.ir.spec import MeshShape
from ffjax.planning.tracing import trace_step
from ffjax.strategies.families import family_keys
from ffjax.strategies.problem import Problem, build_problem
from tests.random_programs import Pick, drawn_picks, random_step

MOST_CHOICES = 3_000
"""Choices that are tried one by one."""

quick = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)


KINDS = ("dot", "dot", "elementwise", "scaled by a sum", "transposed", "cumsum")


def slow_links() -> Cluster:
    """Where communication and computation of small arrays weigh about the same."""
    return Cluster.named("cpu", devices_per_host=4)


def problem_of(regions: Regions, mesh: MeshShape, cluster: Cluster) -> Problem:
    keys = family_keys(regions)
    return build_problem(regions, keys, by_family(kernels(regions), keys), CollectiveModel(mesh, cluster))


def regions_of(step: Callable[..., Any], *args: Any, **options: Any) -> Regions:
    return find_regions(build_graph(trace_step(step, args, {}, **options)))


def choices(problem: Problem) -> itertools.product[tuple[int, ...]]:
    return itertools.product(*(range(len(n.candidates)) for n in problem.nodes))


programs = drawn_picks(KINDS, 6)
meshes = st.sampled_from([MeshShape(("x",), (4,)), MeshShape(("x", "y"), (2, 2))])


def random_problem(picks: Sequence[Pick], mesh: MeshShape, size: int = 512) -> Problem:
    shapes = [jax.ShapeDtypeStruct((size, size), jnp.float32)] * 2
    return problem_of(regions_of(random_step(picks, results=None), *shapes), mesh, slow_links())


def small_problem(picks: Sequence[Pick], mesh: MeshShape, most: int = MOST_CHOICES) -> Problem:
    """One with no more than so many choices; for property tests only."""
    problem = random_problem(picks, mesh)
    assume(1 < math.prod(len(n.candidates) for n in problem.nodes) <= most)
    return problem
