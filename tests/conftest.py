"""Every test runs on eight CPU fake devices; `pytest --gpu -m gpu` runs those marked `gpu` on a real one.

`pytest --full` also runs what is left out of large matrices by default.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import jax
import pytest

from ffjax.cost.profiles import store as profile_store
from ffjax.ir.spec import MeshShape
from ffjax.testing import fake_devices

RECORDED = (0, 10)
"""The release of JAX that recorded figures are of."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu", action="store_true", help="let JAX use a GPU, and run the tests marked gpu")
    parser.addoption("--full", action="store_true", help="run the tests marked full: all of a matrix, not a rotation")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "recorded: holds figures of programs and compilers of jax 0.10 against ours; other releases trace others",
    )
    config.addinivalue_line("markers", "full: a part of a matrix that only --full runs")
    # What somebody measured on this machine must not change what tests see.
    profile_store.DATABASE = Path(tempfile.gettempdir()) / "ffjax-tests-have-no-profiles.sqlite"
    fake_devices(8, cpu_only=not config.getoption("--gpu"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--full"):
        rest = [item for item in items if item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=rest)
        items[:] = [item for item in items if not item.get_closest_marker("full")]
    if jax.__version_info__[:2] != RECORDED:
        for item in items:
            if item.get_closest_marker("recorded"):
                item.add_marker(pytest.mark.skip(reason="recorded with another release of jax"))
    if jax.default_backend() == "gpu":
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no GPU, or no --gpu"))


@pytest.fixture(
    params=[
        MeshShape(("x",), (8,)),
        MeshShape(("x", "y"), (4, 2)),
        MeshShape(("x", "y", "z"), (2, 2, 2)),
    ],
    ids=str,
)
def mesh_shape(request: pytest.FixtureRequest) -> MeshShape:
    """Each way of arranging the eight devices that is worth a test of its own."""
    shape: MeshShape = request.param
    return shape
