"""`ffjax.ir.reshard` against Shardy's own pass, for every pair of specs of small meshes."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
from jax.extend.mlir import ir
from jax.interpreters import mlir as jax_mlir

from ffjax.emit.oracle import collectives_in, run_passes
from ffjax.ir.reshard import reshard, reshard_steps
from ffjax.ir.spec import Collective, MeshShape, Spec, divides, local_shape

MESHES = {
    "8": MeshShape(("x",), (8,)),
    "4x2": MeshShape(("x", "y"), (4, 2)),
    "2x4": MeshShape(("x", "y"), (2, 4)),
    "3x2": MeshShape(("x", "y"), (3, 2)),
    "2x2x2": MeshShape(("x", "y", "z"), (2, 2, 2)),
}
# Larger ones are sampled: parts of axes, sizes that do not divide each other, four axes. (2, 3, 4) is not
# here: for some pairs of it the pass itself emits a permutation that its own verifier rejects.
SAMPLED = {
    "4x2x2": MeshShape(("x", "y", "z"), (4, 2, 2)),
    "2x8": MeshShape(("x", "y"), (2, 8)),
    "6x4": MeshShape(("x", "y"), (6, 4)),
    "2x2x2x2": MeshShape(("x", "y", "z", "w"), (2, 2, 2, 2)),
}
SAMPLE = 3000


def all_specs(mesh: MeshShape, rank: int) -> list[Spec]:
    """Every spec: some of the axes, in every order, cut into dimensions in every way."""
    found: set[Spec] = set()
    for n in range(len(mesh.axes) + 1):
        for order in itertools.permutations(mesh.axes, n):
            for places in itertools.combinations_with_replacement(range(rank), n):
                found.add(tuple(tuple(a for a, p in zip(order, places, strict=True) if p == d) for d in range(rank)))
    return sorted(found)


def shardy(pairs: Sequence[tuple[Spec, Spec]], mesh: MeshShape, shape: tuple[int, ...]) -> list[tuple[Collective, ...]]:
    """What Shardy makes of each resharding of an f32 tensor; each stands at a line of its own."""

    def text(spec: Spec) -> str:
        return "<@mesh, [" + ", ".join("{" + ", ".join(f'"{a}"' for a in dim) + "}" for dim in spec) + "]>"

    tensor = "tensor<" + "".join(f"{n}x" for n in shape) + "f32>"
    axes = ", ".join(f'"{a}"={n}' for a, n in zip(mesh.axes, mesh.sizes, strict=True))
    arguments = ", ".join(
        f"%a{i}: {tensor} {{sdy.sharding = #sdy.sharding{text(s)}}}" for i, (s, _) in enumerate(pairs)
    )
    body = "\n".join(
        f'%{i} = sdy.reshard %a{i} {text(t)} : {tensor} loc("pair":{i}:0)' for i, (_, t) in enumerate(pairs)
    )
    results = ", ".join(f"%{i}" for i in range(len(pairs)))
    types = ", ".join([tensor] * len(pairs))
    module = f"""module {{
      sdy.mesh @mesh = <[{axes}]>
      func.func @main({arguments}) -> ({types}) {{
        {body}
        return {results} : {types}
      }}
    }}"""
    with jax_mlir.make_ir_context() as context:
        parsed = ir.Module.parse(module, context=context).operation
        run_passes(parsed, "builtin.module(func.func(sdy-reshard-to-collectives))")
        found: list[list[Collective]] = [[] for _ in pairs]
        for one in collectives_in(parsed):
            found[int(one.source.split(":")[1])].append(one.collective)
    return [tuple(f) for f in found]


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_same_as_shardy(mesh: MeshShape, rank: int) -> None:
    specs = all_specs(mesh, rank)
    check(list(itertools.product(specs, specs)), mesh, (24, 48, 72)[:rank])


@pytest.mark.parametrize("mesh", SAMPLED.values(), ids=SAMPLED)
def test_same_as_shardy_on_a_sample(mesh: MeshShape) -> None:
    specs = all_specs(mesh, 3)
    draw = random.Random(0)
    check([(draw.choice(specs), draw.choice(specs)) for _ in range(SAMPLE)], mesh, (48, 96, 144))


def test_same_as_shardy_where_a_dimension_is_too_small_to_be_sliced_twice() -> None:
    mesh = MESHES["2x2x2"]
    specs = all_specs(mesh, 2)
    shape = (2, 8)
    specs = [s for s in specs if divides(shape, s, mesh)]
    check(list(itertools.product(specs, specs)), mesh, shape)


def check(pairs: Sequence[tuple[Spec, Spec]], mesh: MeshShape, shape: tuple[int, ...]) -> None:
    wrong = []
    for (source, target), expected in zip(pairs, shardy(pairs, mesh, shape), strict=True):
        elements = 4.0
        for n in local_shape(shape, source, mesh):
            elements *= n
        ours = reshard(source, target, mesh, elements, shape)
        same = [(c.kind, c.axes) for c in ours] == [(c.kind, c.axes) for c in expected] and all(
            a.bytes == pytest.approx(b.bytes) for a, b in zip(ours, expected, strict=True)
        )
        if not same:
            wrong.append(f"{source} -> {target}\n  shardy {expected}\n  ours   {ours}")
    assert not wrong, f"{len(wrong)} of {len(pairs)} differ:\n" + "\n".join(wrong[:10])


def test_shape_only_matters_where_it_does_not_divide() -> None:
    mesh = MESHES["2x2x2"]
    specs = all_specs(mesh, 2)
    for source, target in itertools.product(specs, specs):
        assert reshard_steps(source, target, mesh) == reshard_steps(source, target, mesh, (64, 64))


def test_ranks_must_agree() -> None:
    with pytest.raises(ValueError, match="ranks differ"):
        reshard((("x",),), (("x",), ()), MESHES["8"], 1.0)
