"""From a function of pytrees to a `Program`: one flat jaxpr, with a path for every argument and result."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.tree_util import PyTreeDef, keystr, tree_flatten_with_path, tree_structure

from ffjax.errors import TraceError
from ffjax.ir.compat import (
    AS_WRITTEN,
    Jaxpr,
    JaxprEqn,
    automatic_mesh,
    checkpoint_policy,
    constraint_of,
    has_checkpoints,
    has_explicit_axes,
    without_references,
)
from ffjax.ir.inline import Array, inline, over_devices, walk

_LIBRARIES = (str(Path(jax.__file__).parent), str(Path(__file__).parents[1]))
"""Where lines are not the user's: JAX, and this package."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """One array of the arguments or the results: where it is in the pytree, and what it is."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    root: str
    """The argument, or the element of the result, that it is part of."""

    def __str__(self) -> str:
        return f"{self.path}: {self.dtype}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Program:
    """A traced step. The jaxpr's arguments are `closures` first, then the leaves of the arguments."""

    name: str
    jaxpr: Jaxpr
    closures: tuple[Array, ...]
    args: tuple[Leaf, ...]
    results: tuple[Leaf, ...]
    in_tree: PyTreeDef
    out_tree: PyTreeDef
    donated: tuple[bool, ...]
    ties: tuple[tuple[int, int], ...]
    """Pairs (argument leaf, result leaf) where the result is the next step's argument."""
    remat: str = AS_WRITTEN
    """The policy that its `jax.checkpoint` regions were traced under."""
    checkpoints: bool = False
    """Whether it has such regions, so that it is another program under another policy."""
    carried: tuple[NamedSharding | None, ...] = ()
    """For each argument leaf the sharding over several devices that it came with."""
    constraints: tuple[NamedSharding, ...] = ()
    """The shardings that its own constraints ask for, each once."""


def trace(
    fn: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any] | None = None,
    *,
    static_argnums: tuple[int, ...] = (),
    static_argnames: tuple[str, ...] = (),
    donate_argnums: tuple[int, ...] = (),
    donate_argnames: tuple[str, ...] = (),
    remat: str = AS_WRITTEN,
) -> Program:
    """Traces `fn` at its arguments, which may be arrays or `jax.ShapeDtypeStruct`.

    Args:
      fn: any function that `jax.jit` takes.
      args, kwargs: its arguments.
      static_argnums, static_argnames: those of `args`, counted from 0, and of `kwargs` that are passed as they are.
      donate_argnums, donate_argnames: likewise, those that the step may overwrite.
      remat: what to trace `jax.checkpoint` regions under: `"as written"`, or a key of `CHECKPOINT_POLICIES`.

    Raises:
      TraceError: when the function cannot be traced; says what JAX said and where.
    """
    kwargs = kwargs or {}
    static = set(static_argnums)
    names = argument_names(fn, len(args))
    dynamic = [i for i in range(len(args)) if i not in static]
    fixed = {name: kwargs[name] for name in static_argnames}
    traced = {name: value for name, value in kwargs.items() if name not in fixed}
    flat, in_tree = tree_flatten_with_path(([args[i] for i in dynamic], traced))
    roots = [names[dynamic[path[1].idx]] if path[0].idx == 0 else str(path[1].key) for path, _ in flat]
    paths = ["/".join(filter(None, (root, _path(path[2:])))) for root, (path, _) in zip(roots, flat, strict=True)]
    donated_names = {names[i] for i in donate_argnums} | set(donate_argnames)
    fn_name = function_name(fn)
    avals = [abstract(leaf, f"{fn_name}: argument {path}") for (_, leaf), path in zip(flat, paths, strict=True)]
    results: list[tuple[Any, Any]] = []
    out_tree: list[PyTreeDef] = []

    def flat_fn(*values: Any) -> list[Any]:
        arguments, keywords = jax.tree.unflatten(in_tree, values)
        given = iter(arguments)
        out = fn(*(args[i] if i in static else next(given) for i in range(len(args))), **keywords, **fixed)
        results[:] = tree_flatten_with_path(out)[0]
        out_tree[:] = [tree_structure(out)]
        return [leaf for _, leaf in results]

    flat_fn.__name__ = fn_name
    try:
        with checkpoint_policy(remat), automatic_mesh():
            closed = jax.jit(flat_fn).trace(*avals).jaxpr
    except (TypeError, jax.errors.JAXTypeError, jax.errors.JAXIndexError) as error:
        raise TraceError(_untraceable(fn_name, error, paths)) from error
    except ValueError as error:
        if not has_explicit_axes():
            raise
        raise TraceError(
            f"{fn_name} cannot be traced without the explicit axes of the mesh that is set: {error}\nRemedy: leave out "
            "out_sharding= and jax.sharding.reshard, which the plan replaces; what must stay can be a "
            "jax.lax.with_sharding_constraint."
        ) from error
    except NameError as error:
        if "axis name" not in str(error):
            raise
        raise TraceError(
            f"{fn_name} uses an axis that only pmap, vmap or shard_map around it would have: {error} Remedy: write the "
            "step as for one device, without psum and pmean: the batch is split, and what that leaves apart added up, "
            "by the plan."
        ) from error
    if len(closed.jaxpr.invars) != len(avals) or any(isinstance(c, jax.core.Tracer) for c in closed.consts):
        # JAX itself says so only when it lowers the program.
        raise TraceError(
            f"{fn_name} uses a value that another traced function left behind in a list, an attribute or a global. "
            "Remedy: return such values as results, and pass them as arguments."
        )
    jaxpr, closures = inline(without_references(closed))
    arg_leaves = tuple(_leaf(path, aval, root) for path, aval, root in zip(paths, avals, roots, strict=True))
    is_tuple = isinstance(jax.tree.unflatten(out_tree[0], [None] * len(results)), (tuple, list))
    result_leaves = tuple(
        _leaf(_path(path), v.aval, _path(path[:1]) if is_tuple else "")
        for (path, _), v in zip(results, jaxpr.outvars, strict=True)
    )
    return Program(
        name=fn_name,
        jaxpr=jaxpr,
        closures=closures,
        args=arg_leaves,
        results=result_leaves,
        in_tree=in_tree,
        out_tree=out_tree[0],
        donated=tuple(leaf.root in donated_names for leaf in arg_leaves),
        ties=find_ties(arg_leaves, result_leaves, donated_names),
        remat=remat,
        checkpoints=has_checkpoints(closed),
        carried=tuple(_carried(leaf) for _, leaf in flat),
        constraints=constraints_in(jaxpr),
    )


def constraints_in(jaxpr: Jaxpr) -> tuple[NamedSharding, ...]:
    """The shardings that a program's constraints ask for, each once, the first ones first."""
    found: dict[NamedSharding, None] = {}

    def visit(eqn: JaxprEqn) -> None:
        if (sharding := constraint_of(eqn)) is not None:
            found[sharding] = None

    walk(jaxpr, visit)
    return tuple(found)


def _carried(leaf: Any) -> NamedSharding | None:
    sharding = getattr(leaf, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) and over_devices(sharding) else None


def _untraceable(name: str, error: Exception, paths: Sequence[str]) -> str:
    """What JAX said, with the arguments' own names and the user's own line."""

    def path(match: re.Match[str]) -> str:
        index = int(match[1])
        return repr(paths[index]) if index < len(paths) else match[0]

    said = re.sub(r"\bvalues\[(\d+)\]", path, str(error).strip())
    said = re.sub(r"^The error occurred while tracing .* for jit\. ", "", said, flags=re.MULTILINE)
    own = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_LIBRARIES)]
    where = f" at {own[-1].filename}:{own[-1].lineno} ({(own[-1].line or '').strip()})" if own else ""
    return (
        f"{name} cannot be traced: {type(error).__name__}{where}: {said}\n"
        "Remedy: make it run under jax.jit first (jnp for np, jax.lax.cond for if); what Python itself must see goes "
        "into static_argnums or static_argnames."
    )


def function_name(fn: Callable[..., Any]) -> str:
    """The name of a function; of a partial that of what it calls, of another callable that of its class."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    return getattr(fn, "__name__", type(fn).__name__)


def argument_names(fn: Callable[..., Any], count: int) -> list[str]:
    """The names of the first `count` positional parameters; `arg3` where there is no name."""
    try:
        parameters = list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return [positional[i] if i < len(positional) else f"arg{i}" for i in range(count)]


def abstract(leaf: Any, what: str) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an argument, without its placement (the plan decides that)."""
    try:
        aval = jax.typeof(leaf) if not isinstance(leaf, jax.ShapeDtypeStruct) else leaf
        return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=getattr(aval, "weak_type", False))
    except (TypeError, AttributeError) as error:
        raise TraceError(
            f"{what} is {type(leaf).__name__}, which is no array. Remedy: name it in static_argnums or "
            "static_argnames, or make it a pytree of arrays."
        ) from error


def find_ties(args: Sequence[Leaf], results: Sequence[Leaf], donated: set[str]) -> tuple[tuple[int, int], ...]:
    """Pairs each result with the argument that it replaces in the next step.

    An element of the result replaces the argument with which it shares most leaves (same path inside,
    same shape and dtype); a step that returns its arguments in order is the tie-break. A leaf that
    differs (a counter that changes type, a field that appears) is simply not paired. A result that is a
    tuple or list may be one argument itself (a list of layers, a named tuple), where that pairs more.
    """
    whole = [dataclasses.replace(leaf, root="") for leaf in results]
    return max(_ties(args, results, donated), _ties(args, whole, donated), key=len)


def _ties(args: Sequence[Leaf], results: Sequence[Leaf], donated: set[str]) -> tuple[tuple[int, int], ...]:
    def inside(leaf: Leaf, root: str) -> str:
        return leaf.path[len(root) :].lstrip("/") if leaf.path.startswith(root) else leaf.path

    def keys(leaves: Sequence[Leaf]) -> dict[str, dict[tuple[object, ...], int]]:
        roots: dict[str, dict[tuple[object, ...], int]] = {}
        for index, leaf in enumerate(leaves):
            roots.setdefault(leaf.root, {})[(inside(leaf, leaf.root), leaf.shape, leaf.dtype)] = index
        return roots

    arg_roots, result_roots = keys(args), keys(results)
    shared: Counter[tuple[str, str]] = Counter()
    for a, arg_leaves in arg_roots.items():
        for r, result_leaves in result_roots.items():
            shared[a, r] = len(arg_leaves.keys() & result_leaves.keys())
    order = {name: i for i, name in enumerate(arg_roots)}
    taken: set[str] = set()
    ties: list[tuple[int, int]] = []
    for (a, r), count in sorted(shared.items(), key=lambda e: (e[0][0] not in donated, -e[1], order[e[0][0]])):
        if count == 0 or a in taken or r in taken:
            continue
        # A lone scalar that looks like another (a loss like a step count) is no state.
        if a not in donated and count == 1 and all(args[i].shape == () for i in arg_roots[a].values()):
            continue
        taken |= {a, r}
        ties += [(arg_roots[a][key], result_roots[r][key]) for key in arg_roots[a].keys() & result_roots[r].keys()]
    return tuple(sorted(ties))


def _path(path: Sequence[Any]) -> str:
    return keystr(tuple(path), simple=True, separator="/")


def _leaf(path: str, aval: Any, root: str) -> Leaf:
    return Leaf(path=path, shape=tuple(aval.shape), dtype=str(aval.dtype), root=root)
