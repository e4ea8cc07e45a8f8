"""pytest's plugin: of no account to suites that do not ask for it, and early enough for those that do."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

QUIET = ("-p", "pytest_ffjax", "-p", "no:cacheprovider", "-W", "error")


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A project of its own, whose JAX is asked for nothing by this one's environment."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    return pytester


def test_a_suite_that_asks_for_nothing_gets_nothing(suite: pytest.Pytester) -> None:
    suite.makepyfile("""
        import sys

        def test_nothing_is_imported():
            assert "pytest_ffjax" in sys.modules
            assert not [name for name in sys.modules if name.partition(".")[0] in ("jax", "jaxlib", "ffjax")]
    """)
    result = suite.runpytest_subprocess(*QUIET, "-p", "no:jaxtyping")
    result.assert_outcomes(passed=1, warnings=0)


def test_devices_are_there_before_anything_of_the_suite_is_imported(suite: pytest.Pytester) -> None:
    suite.makeini("[pytest]\nffjax_devices = 6")
    suite.makeconftest("import jax\nSEEN = jax.device_count()")
    suite.makepyfile("""
        import jax, conftest
        SEEN = jax.device_count()

        def test_devices(ffjax_devices):
            assert conftest.SEEN == SEEN == len(ffjax_devices) == 6
            assert {d.platform for d in ffjax_devices} == {"cpu"}
    """)
    suite.runpytest_subprocess(*QUIET).assert_outcomes(passed=1, warnings=0)


def test_asking_does_not_start_jax(suite: pytest.Pytester) -> None:
    """A conftest may still configure it."""
    suite.makeini("[pytest]\nffjax_devices = 6")
    suite.makeconftest("import jax\njax.config.update('jax_num_cpu_devices', 3)\nassert jax.device_count() == 3")
    result = suite.runpytest_subprocess(*QUIET)
    result.stderr.fnmatch_lines("*ffjax_devices = 6: *JAX has started already with 3 CPU device(s)*")


def test_a_jax_that_has_started_with_fewer(suite: pytest.Pytester) -> None:
    suite.makeini("[pytest]\nffjax_devices = 6")
    suite.makepyfile(early="import jax\njax.devices()")
    result = suite.runpytest_subprocess("-p", "early", *QUIET)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines("*ffjax_devices = 6: *JAX has started already with 1 CPU device(s)*")


def test_a_count_that_is_none(suite: pytest.Pytester) -> None:
    suite.makeini("[pytest]\nffjax_devices = many")
    result = suite.runpytest_inprocess(*QUIET)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines("*ffjax_devices = many: write how many CPU devices*")


def test_the_fixture_without_the_option_says_what_to_write(suite: pytest.Pytester) -> None:
    suite.makepyfile("def test_devices(ffjax_devices): pass")
    result = suite.runpytest_inprocess(*QUIET)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines("*the fixture ffjax_devices needs the option: ffjax_devices = 8*")


def test_golden_plans_are_written_on_request_only(suite: pytest.Pytester) -> None:
    suite.makeini("[pytest]\nffjax_devices = 8")
    suite.makepyfile("""
        from pathlib import Path
        import ffjax, jax, jax.numpy as jnp
        from ffjax.testing import assert_plan_matches

        def step(w, x):
            return w - 0.1 * x.T @ (x @ w)

        def test_plan():
            shapes = jax.ShapeDtypeStruct((64, 8), jnp.float32), jax.ShapeDtypeStruct((1024, 64), jnp.float32)
            plan = ffjax.plan(step, *shapes, mesh={"x": 8}, strategy="data_parallel")
            assert_plan_matches(plan, Path(__file__).with_name("step.plan"))
    """)
    result = suite.runpytest_inprocess(*QUIET)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines("*there is no golden plan *step.plan' yet*pytest --ffjax-update-plans*")
    suite.runpytest_inprocess(*QUIET, "--ffjax-update-plans").assert_outcomes(passed=1)
    written = (suite.path / "step.plan").read_text()
    suite.runpytest_inprocess(*QUIET).assert_outcomes(passed=1)
    (suite.path / "step.plan").write_text(written.replace("(x, -)", "(-, x)"))
    result = suite.runpytest_inprocess(*QUIET)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["E *-  x*(-, x)", "E *+  x*(x, -)", "*If the plan is meant to change: pytest*"])


def test_the_example_of_a_users_project(suite: pytest.Pytester) -> None:
    """Its tests and its strategy as a user has them: run from its folder, under its own configuration."""
    project = Path(__file__).resolve().parent.parent / "examples" / "own_project"
    shutil.copytree(project, suite.path, dirs_exist_ok=True)
    suite.runpytest_subprocess(*QUIET).assert_outcomes(passed=7, warnings=0)
