"""The zoo: published sizes, and every model at a tiny size runs one step, sharded as unsharded.

By default some models run once each, on one of two meshes, with their layers scanned or unrolled in turn; `pytest
--full` runs all on both.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import pytest

import ffjax
from ffjax.errors import FfjaxWarning
from ffjax.testing import assert_same_numerics

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "benchmarks"))
from zoo.model import Model
from zoo.registry import ZOO, build

ROTATION = ["gpt3_175b", "mixtral_8x7b", "vit_h14", "dlrm_mlperf", "nmt_lstm", "mesh_graph_net"]
"""Those that run by default; the compiler takes seconds for each."""
MESHES = ({"x": 8}, {"x": 4, "y": 2})
WITHIN = 0.03


@pytest.mark.parametrize("name", ZOO)
def test_published_size(name: str) -> None:
    published = ZOO[name].published
    if published is not None:
        assert build(name, 8).parameters == pytest.approx(published, rel=WITHIN)


def test_depth_and_unrolling_keep_the_weights() -> None:
    scanned, unrolled = (build("llama3_8b", 8, layers=4, scanned=s) for s in (True, False))
    assert scanned.parameters == unrolled.parameters
    assert len(jax.tree.leaves(unrolled.args)) > len(jax.tree.leaves(scanned.args))


def test_unknown_model_and_field() -> None:
    with pytest.raises(ValueError, match="there is no model 'gpt5'; the zoo has gpt3_175b"):
        build("gpt5", 8)
    with pytest.raises(ValueError, match="inception_v3 has no layers to change"):
        build("inception_v3", 8, layers=3)


def has_unrolled(name: str) -> bool:
    return "scanned" in {field.name for field in dataclasses.fields(ZOO[name].tiny)}


def cases() -> list[Any]:
    rows = []
    for n, name in enumerate(ZOO):
        variants = [{"scanned": True}, {"scanned": False}] if has_unrolled(name) else [{}]
        for m, mesh in enumerate(MESHES):
            for v, changes in enumerate(variants):
                rotation = name in ROTATION and m == n % 2 and v == n // 2 % len(variants)
                marks = () if rotation else (pytest.mark.full,)
                kind = "".join("-scanned" if s else "-unrolled" for s in changes.values())
                rows.append(pytest.param(name, mesh, changes, id=f"{name}{kind}-{m}", marks=marks))
    return rows


@pytest.fixture
def compiled_quickly() -> Iterator[None]:
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.usefixtures("compiled_quickly")
@pytest.mark.parametrize(("name", "mesh", "changes"), cases())
def test_one_step(name: str, mesh: dict[str, int], changes: dict[str, bool]) -> None:
    model: Model = build(name, 8, tiny=True, **changes)
    example = model.example()
    expected = jax.jit(model.step)(*example)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the batch is not split", FfjaxWarning)  # so small, nothing pays
        found = ffjax.autoshard(model.step, mesh=mesh)(*example)
    assert_same_numerics(found, expected, name=name)
