"""Flax NNX: steps that mutate the modules, optimizers and metrics that they are given, as under `nnx.jit`.

Such a step becomes a function of state. All objects are split together (they may share variables) into one graph and
one dictionary of arrays, `modules`, by argument name; the step runs on merged copies, and what it left in them is an
extra result, with which the caller's objects are updated. Flax is imported only if the caller has.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from ffjax.arguments import Marked
from ffjax.ir.trace import argument_names


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A step and its arguments as JAX takes them, and what to do with the result."""

    step: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    static_argnums: tuple[int, ...]
    static_argnames: tuple[str, ...]
    donate_argnums: tuple[int, ...]
    donate_argnames: tuple[str, ...]
    finish: Callable[[Any], Any]

    @property
    def static(self) -> dict[int | str, Hashable]:
        """The static arguments, by number or keyword."""
        return {i: self.args[i] for i in self.static_argnums} | {k: self.kwargs[k] for k in self.static_argnames}

    @property
    def traced(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The other arguments and keywords, as the program has them."""
        args = tuple(a for i, a in enumerate(self.args) if i not in self.static_argnums)
        return args, {k: v for k, v in self.kwargs.items() if k not in self.static_argnames}


def as_function(
    step: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    static: Marked,
    donated: Marked,
) -> Call:
    """The call as it is, or, if NNX objects are among its arguments, one on their state."""
    static_argnums, static_argnames = static.numbers(len(args)), static.names(kwargs)
    donate_argnums, donate_argnames = donated.numbers(len(args)), donated.names(kwargs)
    names = argument_names(step, len(args))
    objects = {names[i]: a for i, a in enumerate(args) if i not in static_argnums and has_objects(a)}
    objects |= {k: v for k, v in kwargs.items() if k not in static_argnames and has_objects(v)}
    if not objects:
        return Call(
            step=step,
            args=tuple(args),
            kwargs=kwargs,
            static_argnums=static_argnums,
            static_argnames=static_argnames,
            donate_argnums=donate_argnums,
            donate_argnames=donate_argnames,
            finish=lambda result: result,
        )
    from flax import nnx

    plain = [i for i in range(len(args)) if names[i] not in objects]

    def run(modules: _State, *rest: Any, **keywords: Any) -> tuple[_State, Any]:
        live = nnx.merge(modules.graph, modules.arrays)
        given = iter(rest)
        positional = [live[names[i]] if names[i] in live else next(given) for i in range(len(args))]
        named = {k: live[k] for k in kwargs if k in live}
        result = step(*positional, **named, **keywords)
        return _split(live), result

    run.__name__ = getattr(step, "__name__", "step")

    def finish(result: tuple[_State, Any]) -> Any:
        nnx.update(objects, result[0].arrays)
        return result[1]

    donates = any(name in objects for name in (*donate_argnames, *(names[i] for i in donate_argnums)))
    return Call(
        step=run,
        args=(_split(objects), *(args[i] for i in plain)),
        kwargs={k: v for k, v in kwargs.items() if k not in objects},
        static_argnums=tuple(1 + plain.index(i) for i in static_argnums),
        static_argnames=static_argnames,
        donate_argnums=(0,) * donates + tuple(1 + plain.index(i) for i in donate_argnums if i in plain),
        donate_argnames=tuple(k for k in donate_argnames if k not in objects),
        finish=finish,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Builder:
    """A function that makes a state, as JAX takes it, and what to do with its result."""

    build: Callable[..., Any]
    arrays: Callable[[Any], Any]
    """What was built without the graph of its objects: the pytree by whose paths it is found among the arguments."""
    finish: Callable[[Any], Any]


def as_builder(init_fn: Callable[..., Any]) -> Builder:
    """An init function whose result, if it has NNX objects in it, is their state."""

    def build(*args: Any) -> Any:
        made = init_fn(*args)
        if not has_objects(made):
            return made
        objects = made if isinstance(made, tuple) else (made,)
        return _split({str(i): o for i, o in enumerate(objects)})

    def arrays(made: Any) -> Any:
        if not isinstance(made, _State):
            return made
        return tuple(made.arrays.values()) if len(made.arrays) > 1 else made.arrays["0"]

    def finish(made: Any) -> Any:
        if not isinstance(made, _State):
            return made
        from flax import nnx

        live = tuple(nnx.merge(made.graph, made.arrays).values())
        return live if len(live) > 1 else live[0]

    return Builder(build=build, arrays=arrays, finish=finish)


def as_arrays(tree: Any) -> tuple[Any, Callable[[Any], Any]]:
    """A state with its NNX objects as nested dictionaries of their arrays, and what puts arrays back into them.

    Of one object, or a tuple of them; any other state stays as it is.
    """
    if not has_objects(tree):
        return tree, lambda arrays: arrays
    from flax import nnx

    objects = {str(i): o for i, o in enumerate(tree)} if isinstance(tree, tuple) else {"0": tree}
    arrays = _split(objects).arrays

    def finish(placed: Any) -> Any:
        nnx.update(objects, {str(i): p for i, p in enumerate(placed)} if isinstance(tree, tuple) else {"0": placed})
        return tree

    return (tuple(arrays[name] for name in objects) if isinstance(tree, tuple) else arrays["0"]), finish


def has_objects(tree: Any) -> bool:
    """Whether any NNX object is in a pytree. An `nnx.State`, which is split off them, is plain."""
    flax = sys.modules.get("flax.nnx")
    if flax is None:
        return False
    found: list[bool] = []
    # Flax 0.12 renamed `Object` to `Pytree`.
    kinds = (getattr(flax, "Pytree", flax.Object), flax.Variable)

    def look(node: Any) -> bool:
        if isinstance(node, kinds):
            found.append(True)
        return bool(found) or isinstance(node, flax.State)

    jax.tree.leaves(tree, is_leaf=look)
    return bool(found)


def _split(objects: dict[str, Any]) -> _State:
    from flax import nnx

    graph, state = nnx.split(objects)
    return _State(graph, nnx.to_pure_dict(state))


@jax.tree_util.register_pytree_with_keys_class
class _State:
    """The arrays of NNX objects, with their graph as static structure."""

    def __init__(self, graph: Any, arrays: Any) -> None:
        self.graph = graph
        self.arrays = arrays

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        items = sorted(self.arrays.items())
        return tuple((jax.tree_util.DictKey(k), v) for k, v in items), (self.graph, tuple(k for k, _ in items))

    @classmethod
    def tree_unflatten(cls, static: Any, children: Sequence[Any]) -> _State:
        graph, keys = static
        return cls(graph, dict(zip(keys, children, strict=True)))
