"""pytest's plugin of ffjax: fake CPU devices for a test suite, and golden plans that are written anew.

    [tool.pytest.ini_options]
    ffjax_devices = 8               # JAX has eight CPU devices in every test

    pytest --ffjax-update-plans     # ffjax.testing.assert_plan_matches writes its files

pytest loads it wherever ffjax is installed. So it does nothing before a suite asks for something, and lies outside the
package, because `import ffjax` imports JAX. (PYTEST_DONT_REWRITE: it may be imported before pytest looks at it.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import jax

_DEVICES = "ffjax_devices"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini(_DEVICES, "How many CPU devices JAX has in this suite; by default it is left alone.")
    parser.getgroup("ffjax").addoption(
        "--ffjax-update-plans",
        action="store_true",
        help="Let ffjax.testing.assert_plan_matches write its golden plans instead of comparing.",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Before any conftest or test module is imported: what they do at import may start JAX, which counts once."""
    _ask_for_devices(early_config)


def pytest_configure(config: pytest.Config) -> None:
    _ask_for_devices(config)  # where a conftest loads this plugin, it is too late for the hook above
    if config.getoption("ffjax_update_plans"):
        from ffjax.testing.golden import update_plans

        update_plans(True)


def pytest_unconfigure(config: pytest.Config) -> None:
    if config.getoption("ffjax_update_plans"):
        from ffjax.testing.golden import update_plans

        update_plans(False)


@pytest.fixture(scope="session")
def ffjax_devices(pytestconfig: pytest.Config) -> list[jax.Device]:
    """The fake devices that the option `ffjax_devices` gives the suite."""
    from ffjax.testing import fake_devices

    count = _count(pytestconfig)
    if not count:
        raise pytest.UsageError(f"the fixture {_DEVICES} needs the option: {_DEVICES} = 8 in pytest's configuration")
    return fake_devices(count)


def _ask_for_devices(config: pytest.Config) -> None:
    if count := _count(config):
        from ffjax.errors import FfjaxError
        from ffjax.testing.devices import ask_for_fake_devices

        try:
            ask_for_fake_devices(count)
        except FfjaxError as error:
            raise pytest.UsageError(f"{_DEVICES} = {count}: {error}") from error


def _count(config: pytest.Config) -> int:
    """0 where a suite asks for none."""
    text = str(config.getini(_DEVICES) or 0)
    if not text.isdecimal():
        raise pytest.UsageError(
            f"{_DEVICES} = {text}: write how many CPU devices JAX shall have, such as 8; 0 for none"
        )
    return int(text)
