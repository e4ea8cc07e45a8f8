"""From a layout back to a JAX program: the same equations, with a sharding constraint on every value.

The partitioner is left nothing to decide. A value is constrained where it is made; where an op reads it in another
sharding, a second constraint there makes the resharding explicit, once per body for all who read it so. An op whose
results are partial sums is constrained first without the axes of the sum (an all-reduce) and, where the plan scatters
them, then with them (which turns it into a reduce-scatter). Bodies of loops, branches and remat regions are rebuilt
with their own constraints inside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from ffjax.emit.by_hand import bind_by_hand
from ffjax.emit.pieces import add_up, bind_beside, bind_on_pieces, with_edges
from ffjax.ir import compat
from ffjax.ir.compat import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var
from ffjax.ir.extra_rules import runs_on_pieces
from ffjax.ir.graph import NO_VALUE, Scope
from ffjax.ir.inline import bodies
from ffjax.ir.layout import Layout
from ffjax.ir.manual import NAME as SHARD_MAP
from ffjax.ir.spec import Spec


def partition_spec(spec: Spec) -> PartitionSpec:
    """`((), ("x",), ("x", "y"))` as `P(None, "x", ("x", "y"))`."""
    return PartitionSpec(*(None if not d else d[0] if len(d) == 1 else d for d in spec))


def emit(layout: Layout, mesh: Mesh | AbstractMesh) -> Callable[..., tuple[jax.Array, ...]]:
    """The sharded step as a function of flat arrays: the program's closures, then the leaves of its arguments."""
    jaxpr = layout.graph.program.jaxpr

    def sharded(*args: jax.Array) -> tuple[jax.Array, ...]:
        return _Interpreter(layout, mesh).run(jaxpr, args, layout.graph.scopes[0])

    sharded.__name__ = layout.graph.program.name
    return sharded


def in_shardings(layout: Layout, mesh: Mesh | AbstractMesh) -> tuple[NamedSharding, ...]:
    """Of the program's closures, then of the leaves of its arguments."""
    graph = layout.graph
    return tuple(NamedSharding(mesh, partition_spec(layout.home(graph.ops[op].results[0]))) for op in graph.arguments)


def out_shardings(layout: Layout, mesh: Mesh | AbstractMesh) -> tuple[NamedSharding, ...]:
    """Of the leaves of the results."""
    return tuple(NamedSharding(mesh, partition_spec(layout.operand(op, 0))) for op in layout.graph.outputs)


class _Interpreter:
    def __init__(self, layout: Layout, mesh: Mesh | AbstractMesh) -> None:
        self.layout = layout
        self.graph = layout.graph
        self.mesh = mesh
        self.copies: dict[tuple[int, tuple[Spec, ...]], jax.Array] = {}
        self.images: dict[int, jax.Array] = {}
        """With the edges that an op brought, for it and for those after it that need the same."""
        self.env: dict[Var, jax.Array] = {}

    def run(self, jaxpr: Jaxpr, args: Sequence[jax.Array], scope: Scope) -> tuple[jax.Array, ...]:
        """Evaluates one body, each in an interpreter of its own: copies are not shared across bodies."""
        self.env.update(zip(jaxpr.invars, args, strict=True))
        if scope.id:
            for var, op in zip(jaxpr.invars, scope.enter, strict=True):
                outside = self.graph.ops[op].operands[0]
                if scope.kind == "cond" and outside != NO_VALUE:
                    self.env[var] = self.moved(self.env[var], outside, op, 0)
                self.env[var] = self.constrain(self.env[var], self.layout.home(self.graph.value_of[var]))
        for eqn in jaxpr.eqns:
            with compat.user_context(eqn):
                results = self.structured(eqn) if bodies(eqn) else self.plain(eqn)
            self.env.update(zip(eqn.outvars, results, strict=True))
        exits = scope.exit if scope.id else self.graph.outputs
        return tuple(self.read(atom, op, 0) for atom, op in zip(jaxpr.outvars, exits, strict=True))

    def constrain(self, array: jax.Array, spec: Spec) -> jax.Array:
        if not spec:
            return array
        held: jax.Array = jax.lax.with_sharding_constraint(array, NamedSharding(self.mesh, partition_spec(spec)))
        return held

    def read(self, atom: Var | Literal, op: int, index: int) -> jax.Array:
        """An operand as its op needs it."""
        if isinstance(atom, Literal):
            return atom.val  # type: ignore[no-any-return]
        return self.moved(self.env[atom], self.graph.value_of[atom], op, index)

    def moved(self, array: jax.Array, value: int, op: int, index: int) -> jax.Array:
        """A value in the sharding in which an op reads it."""
        if not self.graph.values[value].shape:
            return array
        spec = self.layout.operand(op, index)
        if self.graph.values[value].constant:
            return array if self.is_constant(op) else self.constant(array, value, spec)
        if spec == self.layout.home(value):
            return array
        way: tuple[Spec, ...] = ()
        for hop in self.layout.way(value, spec):
            way += (hop.spec,)
            if (value, way) not in self.copies:
                self.copies[value, way] = self.constrain(array, hop.spec)
            array = self.copies[value, way]
        return array

    def is_constant(self, op: int) -> bool:
        results = self.graph.ops[op].results
        return bool(results) and all(self.graph.values[v].constant for v in results)

    def constant(self, array: jax.Array, value: int, spec: Spec) -> jax.Array:
        """A constant held as it is read: Shardy repeats one for each op, but not for two operands of the same op."""
        if (value, (spec,)) not in self.copies:
            self.copies[value, (spec,)] = self.constrain(array, spec)
        return self.copies[value, (spec,)]

    def write(self, array: jax.Array, var: Var, op: int | None) -> jax.Array:
        """A result as its op leaves it."""
        value = self.graph.value_of[var]
        if self.graph.values[value].constant:
            return array
        home = self.layout.home(value)
        partial = self.layout.partial(value)
        if op is not None and (pending := self.layout.pending_axes(op)):
            return self.constrain(array, (pending, *partial))
        if op is not None and self.layout.partial_axes(op):
            array = self.constrain(array, partial)
            return array if home == partial else self.constrain(array, home)
        return self.constrain(array, home)

    def plain(self, eqn: JaxprEqn) -> list[jax.Array]:
        op = self.graph.op_of[id(eqn)]
        operands = [self.read(atom, op, i) for i, atom in enumerate(eqn.invars)]
        own = self.graph.ops[op]
        if compat.constraint_of(eqn) is not None:
            return [self.write(operands[0], eqn.outvars[0], op)]
        target = own.operands[0] if eqn.primitive.name.startswith("scatter") else NO_VALUE
        if target != NO_VALUE and not self.graph.values[target].constant and any(self.layout.operand(op, 0)):
            # XLA merges the slice that makes a piece with the slice that a scatter of one row becomes, and loses the
            # inner slice's clamp: devices that do not hold the row then overwrite another one of theirs.
            piece = jax.lax.optimization_barrier(operands[0])
            operands[0] = self.constrain(piece, self.layout.operand(op, 0))
        pending = self.layout.pending_axes(op)
        if any(v != NO_VALUE and self.layout.pending_axes(self.graph.values[v].producer) for v in own.operands):
            terms = bind_beside(eqn, operands)
            return [self.write(terms if pending else add_up(terms), eqn.outvars[0], op)]
        if eqn.primitive.name == SHARD_MAP:
            made = bind_by_hand(eqn, operands, self.mesh)
            return [self.write(array, var, op) for array, var in zip(made, eqn.outvars, strict=True)]
        if pending or runs_on_pieces(eqn) or self.layout.cuts(op):
            return self.on_pieces(eqn, operands, op)
        return self.bound(eqn, operands, eqn.params, op)

    def on_pieces(self, eqn: JaxprEqn, operands: Sequence[jax.Array], op: int) -> list[jax.Array]:
        ins = [partition_spec(self.layout.operand(op, i)) for i in range(len(operands))]
        outs = [partition_spec(self.layout.partial(self.graph.value_of[v])) for v in eqn.outvars]
        summed, pending = self.layout.partial_axes(op), self.layout.pending_axes(op)
        if cuts := self.layout.cuts(op):
            image, first = cuts[0].halo.operand, self.layout.fetched_by(op)
            if first not in self.images:
                self.images[first] = with_edges(eqn, operands[image], self.mesh, ins[image])
            operands = [*operands[:image], self.images[first], *operands[image + 1 :]]
        results = bind_on_pieces(eqn, operands, self.mesh, ins, outs, summed, pending)
        return [self.write(array, var, op) for array, var in zip(results, eqn.outvars, strict=True)]

    def bound(
        self, eqn: JaxprEqn, operands: Sequence[jax.Array], params: dict[str, object], op: int | None
    ) -> list[jax.Array]:
        results = compat.bind(eqn, operands, params)
        return [self.write(array, var, op) for array, var in zip(results, eqn.outvars, strict=True)]

    def structured(self, eqn: JaxprEqn) -> list[jax.Array]:
        scopes = [self.graph.scopes[s] for s in self.graph.scopes_of[id(eqn)]]
        if eqn.primitive.name == "while":
            return self.while_loop(eqn, *scopes)
        rebuilt = [self.body(jaxpr, scope) for jaxpr, scope in zip(bodies(eqn), scopes, strict=True)]
        params = dict(eqn.params)
        match eqn.primitive.name:
            case "scan":
                params["jaxpr"] = rebuilt[0]
                enters = scopes[0].enter
            case "cond":
                params["branches"] = tuple(rebuilt)
                # Every branch reads the operands; each reshards its own inside.
                operands = [self.env[a] if isinstance(a, Var) else a.val for a in eqn.invars]
                return self.bound(eqn, operands, params, None)
            case _:
                params["jaxpr"] = rebuilt[0].jaxpr
                enters = scopes[0].enter
        operands = [self.read(atom, op, 0) for atom, op in zip(eqn.invars, enters, strict=True)]
        return self.bound(eqn, operands, params, None)

    def while_loop(self, eqn: JaxprEqn, test: Scope, step: Scope) -> list[jax.Array]:
        """A while loop that carries what its body only reads.

        Such arrays are carried anyway once lowered, but there what is handed on is the last resharding of them (Shardy
        lets a chain of constraints on a loop's argument speak for all later uses), which had to be undone each time.
        """
        before, read = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        cond, body = bodies(eqn)

        def run_test(*args: jax.Array) -> jax.Array:
            inner = _Interpreter(self.layout, self.mesh)
            return inner.run(cond, args[:before] + args[before + read :], test)[0]

        def run_step(*args: jax.Array) -> tuple[jax.Array, ...]:
            inner = _Interpreter(self.layout, self.mesh)
            results = inner.run(body, args, step)
            return (*(inner.env[v] for v in body.invars[:read]), *results)

        enters = test.enter[:before] + step.enter
        operands = [self.read(atom, op, 0) for atom, op in zip(eqn.invars, enters, strict=True)]
        avals = [compat.struct_of(v) for v in (*cond.invars[:before], *body.invars)]
        params = dict(eqn.params) | {
            "cond_jaxpr": jax.make_jaxpr(run_test)(*avals),
            "body_jaxpr": jax.make_jaxpr(run_step)(*avals[before:]),
            "body_nconsts": 0,
        }
        results = compat.bind(eqn, operands, params)[read:]
        return [self.write(array, var, None) for array, var in zip(results, eqn.outvars, strict=True)]

    def body(self, jaxpr: Jaxpr, scope: Scope) -> ClosedJaxpr:
        """A body with its constraints, traced anew at the same abstract values."""
        inner = _Interpreter(self.layout, self.mesh)
        avals = [compat.struct_of(v) for v in jaxpr.invars]
        return jax.make_jaxpr(lambda *args: inner.run(jaxpr, args, scope))(*avals)
