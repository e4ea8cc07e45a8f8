"""Every test runs on eight CPU fake devices; `pytest --gpu -m gpu` runs those marked `gpu` on a real one."""

from __future__ import annotations

import jax
import pytest

from ffjax.ir.spec import MeshShape
from ffjax.testing import fake_devices


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu", action="store_true", help="let JAX use a GPU, and run the tests marked gpu")


def pytest_configure(config: pytest.Config) -> None:
    fake_devices(8, cpu_only=not config.getoption("--gpu"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
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
