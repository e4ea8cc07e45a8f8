"""`ffjax.autoshard`: a step that plans itself at its first call, then runs sharded like a jitted function."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict, Unpack, overload

import jax
from jax.sharding import PartitionSpec

from ffjax.arguments import ArgumentOptions, Names, Numbers
from ffjax.cost.cluster import Cluster
from ffjax.errors import TraceError
from ffjax.ir.compat import AS_WRITTEN
from ffjax.plan import Plan
from ffjax.planning.options import NEVER, SearchOptions
from ffjax.sharded import Sharded
from ffjax.step_options import StepOptions
from ffjax.strategies.search import Progress
from ffjax.strategies.session import AUTO


class Keywords(TypedDict, total=False):
    """The keyword arguments of `autoshard`, for type checkers."""

    cluster: Cluster | None
    memory: str | float | None
    strategy: str
    mesh: Mapping[str, int] | None
    pins: Mapping[str, PartitionSpec] | None
    verify: str
    remat: str
    keep_shardings: bool
    plan: Plan | str | os.PathLike[str] | None
    cache: str | os.PathLike[str] | None
    static_argnums: Numbers
    static_argnames: Names
    donate_argnums: Numbers
    donate_argnames: Names
    devices: Sequence[jax.Device] | None
    progress: Progress | None


@overload
def autoshard(step: Callable[..., Any], /, **options: Unpack[Keywords]) -> Sharded: ...
@overload
def autoshard(step: None = None, /, **options: Unpack[Keywords]) -> Callable[[Callable[..., Any]], Sharded]: ...
def autoshard(
    step: Callable[..., Any] | None = None,
    /,
    *,
    cluster: Cluster | None = None,
    memory: str | float | None = None,
    strategy: str = AUTO,
    mesh: Mapping[str, int] | None = None,
    pins: Mapping[str, PartitionSpec] | None = None,
    verify: str = NEVER,
    remat: str = AS_WRITTEN,
    keep_shardings: bool = True,
    plan: Plan | str | os.PathLike[str] | None = None,
    cache: str | os.PathLike[str] | None = None,
    static_argnums: Numbers = None,
    static_argnames: Names = None,
    donate_argnums: Numbers = None,
    donate_argnames: Names = None,
    devices: Sequence[jax.Device] | None = None,
    progress: Progress | None = None,
) -> Sharded | Callable[[Callable[..., Any]], Sharded]:
    """Runs an ordinary single-device step on all devices, sharded by a plan that is searched at its first call.

    Args:
      step: a function as `jax.jit` takes it, or one that mutates NNX modules, as `nnx.jit` takes it.
      cluster: what the costs are of; by default the devices that JAX sees.
      memory: bytes that one device may hold (`"70GiB"` or a number); by default all that it has.
      strategy: `"auto"`, or a named strategy.
      mesh: axis names and sizes, to be used as they are; by default meshes are searched too.
      pins: path patterns of arguments, and the PartitionSpec that each shall have.
      verify: `"finalists"` compiles the best few plans before one is taken; see `ffjax.plan`.
      remat: `"search"` also decides what `jax.checkpoint` regions keep; see `ffjax.plan`.
      keep_shardings: whether arguments that are sharded already when a plan is searched, and sharding constraints in
        the step, stay as they are; see `ffjax.plan`.
      plan: a plan (or its file) to run instead of searching one.
      cache: a folder of plans: one found there for the same program and options is used again.
      static_argnums, static_argnames, donate_argnums, donate_argnames: as in `jax.jit`.
      devices: those to run on; by default all.
      progress: called with what the search is doing and the share that is done.

    Returns:
      The sharded step, or a decorator if no step is given.

    >>> import jax.numpy as jnp
    >>> @autoshard
    ... def step(state, batch):
    ...     return state + (batch @ state).mean(), batch.sum()
    >>> state, total = step(jnp.zeros(4), jnp.ones((8, 4)))
    >>> float(total)
    32.0
    """
    if isinstance(step, Sharded):
        step = step.__wrapped__
    if step is not None and not callable(step):
        raise TraceError(f"autoshard was given {step!r}, which cannot be called. Remedy: give it the step's function.")
    options = StepOptions(
        search=SearchOptions(
            cluster=cluster,
            memory=memory,
            strategy=strategy,
            mesh=mesh,
            pins=pins,
            verify=verify,
            remat=remat,
            keep_shardings=keep_shardings,
            progress=progress,
        ),
        plan=plan if plan is None or isinstance(plan, Plan) else Plan.load(plan),
        cache=cache,
        arguments=ArgumentOptions(
            static_argnums=static_argnums,
            static_argnames=static_argnames,
            donate_argnums=donate_argnums,
            donate_argnames=donate_argnames,
        ),
        devices=devices,
    )
    options.check()
    return functools.partial(Sharded, options=options) if step is None else Sharded(step, options)
