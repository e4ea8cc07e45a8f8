"""Composing rules: what the factors of a chain of ops are."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffjax.ir.compose import NEED_REPLICATION, Composition, Factors, compose, fit
from ffjax.ir.rules import OpShardingRule

parse = OpShardingRule.parse


def sizes(factors: Factors, dim: list[int]) -> list[int]:
    return [factors.size(atom) for atom in factors.leaves(dim)]


@pytest.mark.parametrize(
    ("a", "b", "parts", "whole"),
    [
        ([12], [3, 4], [3, 4], True),
        ([12], [2, 3, 2], [2, 3, 2], True),
        ([4, 6], [8, 3], [4, 2, 3], True),
        ([4, 6], [6, 4], [2, 2, 3, 2], False),  # a major 2 and a minor 2 are shared, 2 * 3 against 3 * 2 between
        ([2, 4], [4, 2], [2, 2, 2], True),
    ],
)
def test_unify(a: list[int], b: list[int], parts: list[int], whole: bool) -> None:
    factors = Factors()
    left, right = [factors.new(n) for n in a], [factors.new(n) for n in b]
    factors.unify(left, right)
    assert sizes(factors, left) == parts
    assert (factors.leaves(left) == factors.leaves(right)) == whole
    marked = [bool(factors.kind(atom) & NEED_REPLICATION) for atom in factors.leaves(left)]
    assert any(marked) != whole
    if not whole:
        assert marked == [False, True, True, False]
        assert factors.leaves(left)[0] == factors.leaves(right)[0]
        assert factors.leaves(left)[-1] == factors.leaves(right)[-1]


_DIMS = st.lists(st.sampled_from([2, 3, 4, 5, 6, 8]), min_size=1, max_size=4)


@given(_DIMS, st.data())
def test_unify_keeps_sizes_and_agrees_on_a_prefix(a: list[int], data: st.DataObject) -> None:
    total = math.prod(a)
    b: list[int] = []
    while math.prod(b) < total:
        rest = total // math.prod(b)
        b.append(data.draw(st.sampled_from([n for n in range(2, rest + 1) if rest % n == 0])))
    factors = Factors()
    left, right = [factors.new(n) for n in a], [factors.new(n) for n in b]
    factors.unify(left, right)
    assert math.prod(sizes(factors, left)) == math.prod(sizes(factors, right)) == total
    # What either side may split, from the major end, is the same on the other.
    free = [
        list(itertools.takewhile(lambda f: not factors.kind(f) & NEED_REPLICATION, factors.leaves(side)))
        for side in (left, right)
    ]
    assert free[0] == free[1]
    before = (factors.leaves(left), factors.leaves(right))
    factors.unify(left, right)
    assert (factors.leaves(left), factors.leaves(right)) == before or free[0] != before[0]


def test_attention_keeps_batch_and_heads() -> None:
    split = parse("([i, j, kl])->([i, j, k, l]) {i=8, j=16, k=4, l=32}")
    project = parse("([i, j, l], [l, k])->([i, j, k]) {i=8, j=16, k=128, l=64} reduction={l}")
    scores = parse("([i, k, j, m], [i, l, j, m])->([i, j, k, l]) {i=8, j=4, k=16, l=16, m=32} reduction={m}")
    rule = compose(
        [
            (project, ["x", "wq"], ["q"]),
            (project, ["x", "wk"], ["k"]),
            (split, ["q"], ["qh"]),
            (split, ["k"], ["kh"]),
            (scores, ["qh", "kh"], ["s"]),
        ],
        ["x", "wq", "wk"],
        ["s"],
    )
    # The same sequence meets itself in the scores: it cannot be split on both sides.
    expected = "([i, k, l], [l, jm], [l, jm])->([i, j, k, k]) {i=8, j=4, k=16, l=64, m=32} reduction={l, m} "
    assert str(rule) == expected + "need_replication={k}"


def test_reduction_that_indexes_a_result_needs_replication() -> None:
    total = parse("([i, j])->([i]) {i=8, j=4} reduction={j}")
    minus = parse("([i, j], [i])->([i, j]) {i=8, j=4}")
    rule = compose([(total, ["x"], ["s"]), (minus, ["x", "s"], ["y"])], ["x"], ["y"])
    assert str(rule) == "([i, j])->([i, j]) {i=8, j=4} need_replication={j}"


def test_dimension_that_meets_itself_inside_needs_replication() -> None:
    outer = parse("([i], [j])->([i, j]) {i=8, j=8}")
    total = parse("([i, j])->([i]) {i=8, j=8} reduction={j}")
    rule = compose([(outer, ["x", "x"], ["xx"]), (total, ["xx"], ["y"])], ["x"], ["y"])
    assert str(rule) == "([i])->([i]) {i=8} need_replication={i}"


def test_permutations_of_unequal_size_chain() -> None:
    pool = parse("([i, j])->([i, j]) {i=8, j=16} permutation={j}")
    double = compose(
        [(fit(pool, [(8, 32)], [(8, 16)]), "a", "b"), (fit(pool, [(8, 16)], [(8, 8)]), "b", "c")], "a", "c"
    )
    assert str(double) == "([i, j])->([i, j]) {i=8, j=8} permutation={j}"


def test_fit() -> None:
    def fitted(text: str, operands: list[tuple[int, ...]], results: list[tuple[int, ...]]) -> str:
        return str(fit(parse(text), operands, results))

    concatenate = "([i, j], [i, j])->([i, j]) {i=12, j=16} need_replication={i}"
    assert fitted(concatenate, [(8, 16), (4, 16)], [(12, 16)]) == (
        "([k, j], [l, j])->([i, j]) {i=12, j=16, k=8, l=4} need_replication={i, k, l}"
    )
    assert fitted("([i, j])->([j]) {i=1, j=4} need_replication={i}", [(1, 4)], [(4,)]) == "([_, i])->([i]) {i=4}"
    irregular = "([ij, ln])->([ik, mn]) {i=2, j=2, k=3, l=3, m=2, n=2}"
    assert "need_replication" in fitted(irregular, [(4, 6)], [(6, 4)])


def test_bind_says_which_value_disagrees() -> None:
    composition = Composition()
    composition.declare("x", (4, 6))
    with pytest.raises(ValueError, match="'x' has 2 dimensions"):
        composition.add(parse("([i])->([i]) {i=4}"), ["x"], ["y"])
