"""The private JAX APIs that ffjax relies on, all of them, so that a new JAX is checked in one place."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import ad_checkpoint, clusters, debugging, distributed, source_info_util, xla_bridge
from jax._src.interpreters import mlir, partial_eval
from jax._src.state import discharge
from jax._src.state.types import AbstractRef
from jax.extend import core
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

# `jax.extend.core` names these classes but hides their constructors' home.
Var = core.Var
Literal = core.Literal
Jaxpr = core.Jaxpr
ClosedJaxpr = core.ClosedJaxpr
JaxprEqn = core.JaxprEqn


def source_line(eqn: core.JaxprEqn) -> str:
    """`file.py:12` of the user's line that made an equation, or `<unknown>`."""
    frame = source_info_util.user_frame(eqn.source_info.traceback)
    return "<unknown>" if frame is None else f"{frame.file_name}:{frame.start_line}"


def placed(eqn: core.JaxprEqn, call: core.JaxprEqn | None) -> core.JaxprEqn:
    """The equation at the line of the call that it was in, if no line of the user's is known for itself.

    JAX traces the body of a jitted library function without the lines that call it.
    """
    if call is None or source_info_util.user_frame(eqn.source_info.traceback) is not None:
        return eqn
    moved: core.JaxprEqn = eqn.replace(source_info=eqn.source_info.replace(traceback=call.source_info.traceback))
    return moved


def user_context(eqn: core.JaxprEqn):  # type: ignore[no-untyped-def]
    """A context in which new equations take this one's source line and scope name."""
    info = eqn.source_info
    return source_info_util.user_context(info.traceback, name_stack=info.name_stack)


def no_mesh() -> contextlib.AbstractContextManager[object]:
    """A context without the mesh that the user has set (`jax.set_mesh`): what runs in it names its own."""
    if jax.sharding.get_abstract_mesh().empty:
        return contextlib.nullcontext()
    context: contextlib.AbstractContextManager[object] = jax.set_mesh(Mesh(np.empty((), dtype=object), ()))
    return context


def has_explicit_axes() -> bool:
    """Whether the user has set a mesh with axes that are part of the types of arrays."""
    return AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types


def automatic_mesh() -> contextlib.AbstractContextManager[object]:
    """A context in which the axes of the user's mesh are automatic, so that programs are traced without shardings."""
    if not has_explicit_axes():
        return contextlib.nullcontext()
    types = jax.sharding.get_abstract_mesh().axis_types
    automatic = jax.sharding.get_mesh().update(axis_types=(AxisType.Auto,) * len(types))
    context: contextlib.AbstractContextManager[object] = jax.set_mesh(automatic)
    return context


def without_references(closed: core.ClosedJaxpr) -> core.ClosedJaxpr:
    """The program on values alone: references (`jax.new_ref`) that it makes and writes to become what they hold."""
    if not _has_references(closed.jaxpr):
        return closed
    try:
        plain: core.ClosedJaxpr = discharge.discharge_state(closed)
    except TypeError:  # before jax 0.10
        older: Callable[..., tuple[core.Jaxpr, list[object]]] = discharge.discharge_state  # type: ignore[assignment]
        plain = core.ClosedJaxpr(*older(closed.jaxpr, closed.consts))
    return plain


def _has_references(jaxpr: core.Jaxpr) -> bool:
    return _any_equation(jaxpr, lambda e: any(isinstance(v.aval, AbstractRef) for v in e.outvars))


def _any_equation(jaxpr: core.Jaxpr, test: Callable[[core.JaxprEqn], bool]) -> bool:
    """Whether an equation of the program, or of a program inside one of its equations, passes."""

    return any(
        test(e) or any(_any_equation(body, test) for body in jaxprs_in(e))
        for e in jaxpr.eqns
        if e.primitive.name != "pallas_call"
    )


def jaxprs_in(eqn: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    """The programs among an equation's parameters: bodies of calls, loops, branches and regions."""

    def within(param: object) -> Iterator[core.Jaxpr]:
        if isinstance(param, core.ClosedJaxpr):
            yield param.jaxpr
        elif isinstance(param, core.Jaxpr):
            yield param
        elif isinstance(param, tuple):
            for each in param:
                yield from within(each)

    for param in eqn.params.values():
        yield from within(param)


def mesh_sizes(eqn: core.JaxprEqn) -> dict[str, int]:
    """The axes of the mesh that a `shard_map` equation was written for, and their sizes."""
    mesh = eqn.params["mesh"]
    return dict(zip(map(str, mesh.axis_names), mesh.axis_sizes, strict=True))


def manual_axes(eqn: core.JaxprEqn) -> frozenset[str]:
    """The axes over which a `shard_map` equation runs by hand; any others it leaves to the partitioner."""
    name = "newly_manual_axes" if "newly_manual_axes" in eqn.params else "manual_axes"  # the latter before jax 0.10
    return frozenset(map(str, eqn.params[name]))


AS_WRITTEN = "as written"
OFF = "off"
CHECKPOINT_POLICIES: Mapping[str, Callable[..., object] | None] = {
    OFF: None,
    **{
        name: getattr(jax.checkpoint_policies, name)
        for name in ("dots_saveable", "dots_with_no_batch_dims_saveable", "nothing_saveable")
    },
}
"""What the `jax.checkpoint` regions of a program can be traced under in place of their own policies; most saved first.

`"off"` is the program without the regions.
"""

# Part of the keys of JAX's caches, so that nothing traced under one policy is used again under another.
_policy = jax.make_user_context(default_value=AS_WRITTEN)
_bind_checkpoint = ad_checkpoint.remat_p.bind
_rebinding = threading.RLock()


def _bind_under_policy(
    *args: jax.Array, jaxpr: core.Jaxpr, policy: object, prevent_cse: object, differentiated: bool
) -> list[jax.Array]:
    name = _policy.value
    if name == OFF:
        return list(core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, ()))(*args))
    policy = CHECKPOINT_POLICIES.get(name, policy)  # other threads trace as written
    params = {"jaxpr": jaxpr, "policy": policy, "prevent_cse": prevent_cse, "differentiated": differentiated}
    return list(_bind_checkpoint(*args, **params))  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def checkpoint_policy(name: str) -> Iterator[None]:
    """A context in which what is traced has all its `jax.checkpoint` regions under one of `CHECKPOINT_POLICIES`.

    `"as written"` changes nothing. Only the policies are replaced; regions and their `prevent_cse` stay.
    """
    if name == AS_WRITTEN:
        yield
        return
    with _rebinding, _policy(name):
        before = ad_checkpoint.remat_p.bind
        ad_checkpoint.remat_p.bind = _bind_under_policy  # type: ignore[method-assign]
        try:
            yield
        finally:
            ad_checkpoint.remat_p.bind = before  # type: ignore[method-assign]


def has_checkpoints(closed: core.ClosedJaxpr) -> bool:
    """Whether `jax.checkpoint` regions are differentiated in a program, so that their policies decide what is kept."""
    return _any_equation(
        closed.jaxpr, lambda e: e.primitive is ad_checkpoint.remat_p and bool(e.params["differentiated"])
    )


def constraint_of(eqn: core.JaxprEqn) -> NamedSharding | None:
    """The sharding that a constraint in the program asks for; None for other equations, and for what is no mesh's."""
    sharding = eqn.params["sharding"] if eqn.primitive.name == "sharding_constraint" else None
    return sharding if isinstance(sharding, NamedSharding) else None


def unconstrained_dims(eqn: core.JaxprEqn) -> frozenset[int]:
    """The dimensions that a constraint leaves open."""
    dims: frozenset[int] = frozenset(eqn.params["unconstrained_dims"])
    return dims


def constraint(atom: core.Var | core.Literal, sharding: NamedSharding, like: core.JaxprEqn) -> core.JaxprEqn:
    """An equation that constrains a value, at the line of another equation."""
    with no_mesh():
        made = jax.make_jaxpr(lambda x: jax.lax.with_sharding_constraint(x, sharding))(struct_of(atom))
    (eqn,) = made.jaxpr.eqns
    placed_there: core.JaxprEqn = eqn.replace(invars=[atom], outvars=[Var(atom.aval)], source_info=like.source_info)
    return placed_there


def unordered(eqn: core.JaxprEqn) -> core.JaxprEqn:
    """A debug print or callback without its order, which JAX cannot keep on several devices; others as they are."""
    if eqn.primitive.name == "debug_print" and eqn.params["ordered"]:
        changed: dict[str, object] = {"ordered": False}
    elif eqn.primitive.name == "debug_callback" and eqn.params["effect"] is debugging.ordered_debug_effect:
        changed = {"effect": debugging.debug_effect}
    else:
        return eqn
    free: core.JaxprEqn = eqn.replace(params=dict(eqn.params) | changed, effects={debugging.debug_effect})
    return free


def eliminate_dead_code(jaxpr: core.Jaxpr) -> core.Jaxpr:
    """The jaxpr without equations whose results nobody reads; arguments and results stay."""
    live, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
    return live


def with_equations(
    jaxpr: core.Jaxpr,
    *,
    invars: Sequence[core.Var],
    outvars: Sequence[core.Var | core.Literal],
    eqns: Sequence[core.JaxprEqn],
) -> core.Jaxpr:
    """A jaxpr without constants; its effects are those of its equations."""
    effects: frozenset[core.Effect] = frozenset().union(*(e.effects for e in eqns)) if eqns else frozenset()
    debug_info = jaxpr.debug_info.with_unknown_names()
    return core.Jaxpr((), list(invars), list(outvars), list(eqns), effects, debug_info)


def bind(eqn: core.JaxprEqn, operands: Sequence[jax.Array], params: dict[str, object] | None = None) -> list[jax.Array]:
    """Runs or traces an equation's primitive on other operands, under the settings that it was traced under."""
    found = eqn.primitive.get_bind_params(eqn.params if params is None else params)
    subfuns, params = found if isinstance(found, tuple) else ((), found)  # a pair before jax 0.10
    with eqn.ctx.manager:
        out = eqn.primitive.bind(*subfuns, *operands, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def expansion(eqn: core.JaxprEqn) -> core.ClosedJaxpr | None:
    """The program that an equation stands for: one of JAX's higher level (since jax 0.11), or of another library's
    primitive that lowers by tracing a function (`mlir.lower_fun`); None for all others.
    """
    higher = eqn.primitive.name == "call_hi_primitive"
    lower: Callable[..., object] | None = eqn.primitive.to_lojax if higher else _lowering_function(eqn.primitive)
    if lower is None:
        return None
    return jax.make_jaxpr(lambda *args: lower(*args, **eqn.params))(*map(struct_of, eqn.invars))


_TRACED = mlir.lower_fun(lambda: None).__code__
"""The code of every lowering rule that traces a function."""


@functools.lru_cache(maxsize=1024)
def _lowering_function(primitive: core.Primitive) -> Callable[..., object] | None:
    """The function that a primitive of another library lowers to on every platform; JAX's own are left alone."""
    entry = mlir._lowerings.get(primitive)
    rule: Any = getattr(entry, "rule", entry)  # a bare rule before jax 0.10
    specific = any(primitive in rules for rules in mlir._platform_specific_lowerings.values())
    if specific or getattr(rule, "__code__", None) is not _TRACED:
        return None
    fun: Callable[..., object] = inspect.getclosurevars(rule).nonlocals["fun"]
    return None if _module(fun).partition(".")[0] == "jax" else fun


def _module(fun: Callable[..., object]) -> str:
    """Where a function was written, within what `functools.partial` made of it."""
    while isinstance(fun, functools.partial):
        fun = fun.func
    return getattr(fun, "__module__", "jax")


def scan_counts(params: Mapping[str, Any]) -> tuple[int, int]:
    """How many of a `scan`'s operands are constants, and how many after them are carried from trip to trip."""
    if "ft_in" not in params:  # before jax 0.11
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


def with_scan_body(params: Mapping[str, Any], body: core.ClosedJaxpr, constants: int) -> dict[str, Any]:
    """A `scan`'s parameters with another body, which takes so many further constants before all other operands."""
    changed = {**params, "jaxpr": body}
    if "ft_in" in params:
        from jax._src import flattree  # type: ignore[attr-defined]

        consts, carry, xs = params["ft_in"].unpack()
        changed["ft_in"] = flattree.pack((flattree.nones(constants + len(consts)), carry, xs))
    else:  # before jax 0.11
        changed["num_consts"] += constants
        if "linear" in params:  # before jax 0.10
            changed["linear"] = (False,) * constants + tuple(params["linear"])
    return changed


def run_here(jaxpr: core.Jaxpr, args: Sequence[jax.Array]) -> list[jax.Array]:
    """Runs a program without constants under the mesh that is set here, not the one under which it was traced.

    Its sharding constraints, which are for that one, are left out.
    """
    return list(core.jaxpr_as_fun(core.ClosedJaxpr(_under_mesh(jaxpr, jax.sharding.get_abstract_mesh()), ()))(*args))


def _under_mesh(jaxpr: core.Jaxpr, mesh: AbstractMesh) -> core.Jaxpr:
    """The program with another mesh in the types of its values and in the settings of its equations."""
    env: dict[core.Var, core.Var | core.Literal] = {}

    def fresh(var: core.Var) -> core.Var:
        made = env[var] = Var(_retyped(var.aval, mesh))
        return made

    def read(atom: core.Var | core.Literal) -> core.Var | core.Literal:
        # A literal's own array has the mesh in its type.
        return Literal(np.asarray(atom.val), _retyped(atom.aval, mesh)) if isinstance(atom, core.Literal) else env[atom]

    def param(value: object) -> object:
        if isinstance(value, core.ClosedJaxpr):
            return core.ClosedJaxpr(_under_mesh(value.jaxpr, mesh), value.consts)
        if isinstance(value, core.Jaxpr):
            return _under_mesh(value, mesh)
        if isinstance(value, NamedSharding):
            return value.update(mesh=mesh)
        return tuple(map(param, value)) if type(value) is tuple else value

    constants = [fresh(v) for v in jaxpr.constvars]
    arguments = [fresh(v) for v in jaxpr.invars]
    eqns = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "sharding_constraint":
            env[eqn.outvars[0]] = read(eqn.invars[0])
            continue
        # Out of the one mesh before into the other: they may be of different sizes.
        nowhere = jax.sharding.use_abstract_mesh(AbstractMesh((), ()))
        with eqn.ctx.manager, nowhere, jax.sharding.use_abstract_mesh(mesh):
            context = type(eqn.ctx)() if hasattr(type(eqn.ctx), "_create") else eqn.ctx
        params = eqn.params if eqn.primitive.name == "pallas_call" else {k: param(v) for k, v in eqn.params.items()}
        operands = [read(v) for v in eqn.invars]
        eqns.append(eqn.replace(invars=operands, outvars=[fresh(v) for v in eqn.outvars], params=params, ctx=context))
    results = [read(v) for v in jaxpr.outvars]
    debug_info = jaxpr.debug_info.with_unknown_names()
    moved: core.Jaxpr = jaxpr.replace(
        constvars=constants, invars=arguments, outvars=results, eqns=eqns, debug_info=debug_info
    )
    return moved


def _retyped(aval: core.AbstractValue, mesh: AbstractMesh) -> core.AbstractValue:  # type: ignore[name-defined]
    sharding = getattr(aval, "sharding", None)
    return aval.update(sharding=sharding.update(mesh=mesh)) if isinstance(sharding, NamedSharding) else aval


def shape_of(var: core.Var | core.Literal) -> tuple[int, ...]:
    """The shape of an equation's input or output; a token or a reference, which is no array, counts as a scalar."""
    shape: tuple[int, ...] = getattr(var.aval, "shape", ())
    return tuple(shape)


def struct_of(var: core.Var | core.Literal) -> jax.ShapeDtypeStruct:
    """Shape, dtype and weak type of an equation's input or output, without a sharding."""
    return jax.ShapeDtypeStruct(shape_of(var), var.aval.dtype, weak_type=getattr(var.aval, "weak_type", False))  # type: ignore[attr-defined]


def is_extended(dtype: object) -> bool:
    """Whether a dtype is one of JAX's own, such as that of typed PRNG keys."""
    return bool(jnp.issubdtype(dtype, jax.dtypes.extended))  # type: ignore[arg-type]


def dtype_of(var: core.Var | core.Literal) -> np.dtype[np.generic] | None:
    """Its dtype, which may be an extended one; None for what is no array."""
    dtype: np.dtype[np.generic] | None = getattr(var.aval, "dtype", None)
    return dtype


_PARTITIONABLE = "jax_threefry_partitionable"


def nbytes(shape: Sequence[int], dtype: Any) -> float:  # noqa: ANN401  # JAX's extended dtypes have no common type
    """Bytes of an array; a typed PRNG key counts its underlying words."""
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return float(np.prod(shape, dtype=np.float64)) * float(np.prod(dtype._impl.key_shape)) * 4
    itemsize = 0.5 if "int4" in str(dtype) else np.dtype(dtype).itemsize
    return float(np.prod(shape, dtype=np.float64)) * itemsize


def threefry_is_partitionable() -> bool:
    """Whether random bits are functions of the key and their own index, so that any piece can be made in place."""
    return bool(getattr(jax.config, _PARTITIONABLE))


def hlo_text(proto: bytes) -> str | None:
    """The text of a serialized `HloModuleProto`; None where this jaxlib cannot read one. Raises what jaxlib raises."""
    from jax._src.lib import xla_client  # type: ignore[attr-defined]

    homes = (getattr(xla_client, "hlo", None), getattr(xla_client, "_xla", None))  # newer jaxlib, older jaxlib
    parsers = [getattr(getattr(h, "HloModule", None), "from_serialized_hlo_module_proto", None) for h in homes]
    parse = next((p for p in parsers if p is not None), None)
    return None if parse is None else str(parse(proto).to_string())


class KeyValueClient(Protocol):
    """JAX's client of the key-value store that the processes of a run share. Its methods raise what jaxlib raises."""

    def key_value_set_bytes(self, key: str, value: bytes, allow_overwrite: bool = False) -> None: ...
    def blocking_key_value_get_bytes(self, key: str, timeout_in_ms: int) -> bytes: ...


def key_value_client() -> KeyValueClient | None:
    """The client of this process; None unless `jax.distributed` is initialized."""
    client: KeyValueClient | None = distributed.global_state.client
    return client


def detected_processes(
    method: str | None, timeout_s: float
) -> tuple[str | None, int | None, int | None, Sequence[int] | None]:
    """What `jax.distributed.initialize()` takes from SLURM, MPI, Kubernetes or a TPU pod.

    The coordinator's address, the number of processes, this one's id and its devices; None for what they do not say.

    `method` is `initialize`'s `cluster_detection_method`. Raises what JAX's detection raises.
    """
    found: tuple[str | None, int | None, int | None, Sequence[int] | None]
    found = clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, method, int(timeout_s))
    return found


def when_a_callback_fails(tell: Callable[[BaseException], None]) -> None:
    """Has what a callback of a running program raises told at once (`pure_callback`, `io_callback`, `debug.callback`).

    JAX logs it there. The program's results raise it too, but not where a collective beside it waits for ever.
    """

    def look(record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[1] is not None:
            tell(record.exc_info[1])
        return True

    for name in ("jax._src.callback", "jax._src.debugging"):
        logging.getLogger(name).addFilter(look)


def cpu_collectives_over(address: str) -> None:
    """Has the CPU devices of this process listen on one address only, by default that of the host's name.

    Before JAX makes its devices. Only for gloo, the default.
    """
    from jax._src.lib import _jax  # type: ignore[attr-defined]

    def client() -> object:
        gloo = _jax.make_gloo_tcp_collectives(distributed_client=distributed.global_state.client, hostname=address)
        return xla_bridge.make_cpu_client(collectives=gloo)

    xla_bridge.register_backend_factory("cpu", client, priority=0, fail_quietly=False)
