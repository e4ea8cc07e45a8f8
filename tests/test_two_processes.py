"""Two processes with two devices each: states, batches, training, a restart from a checkpoint, caches, a failure.

All of it in two launches of tests/two_processes.py, which the tests look at.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

import ffjax
from ffjax import checkpoint
from ffjax.examples.launch import train
from ffjax.plan import Plan

sys.path.insert(0, str(Path(__file__).parent))
import two_processes
from launched import Launch, launched
from two_processes import DAMAGE, END, HALF

Losses = dict[int, tuple[float, float]]
"""Of each step its loss and what was right before it."""


class Runs(NamedTuple):
    folder: Path
    first: Launch
    plans: dict[str, str]
    """What was in both caches after the first launch, by the file's name."""
    again: Launch


def losses(run: Launch, process: int) -> Losses:
    found = re.findall(rf"^\[{process}\] loss (\d+) (\S+) (\S+)$", run.output, re.MULTILINE)
    return {int(step): (float(loss), float(share)) for step, loss, share in found}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("run")
    command = ["--processes", "2", "--devices-per-process", "2", "--cpu", "--timeout", "60", two_processes.__file__]
    first = launched([*command, "first", str(folder)])
    assert first.status == 0, first.output + first.errors
    plans = {file.name: file.read_text() for file in (folder / "plans 0").iterdir()}
    # Process 0 loses one plan and finds the other damaged.
    for file in (folder / "plans 0").iterdir():
        if file.name.startswith("train_step"):
            file.unlink()
        else:
            file.write_text(file.read_text()[:1000])
    return Runs(folder, first, plans, launched([*command, "again", str(folder)]))


def test_no_process_has_the_whole_of_a_state_or_batch(runs: Runs) -> None:
    assert sorted(re.findall(r"\[(\d)\] states are right", runs.first.output)) == ["0", "1"]


def test_trains_to_the_losses_of_one_process(runs: Runs) -> None:
    step, state = jax.jit(train.train_step), train.init(jax.random.key(0))
    wanted = []
    for i in range(END):
        share = float(two_processes.right(state, two_processes.rows(i)))
        state, loss = step(state, two_processes.rows(i))
        wanted.append((float(loss), share))
    assert losses(runs.first, 0) == losses(runs.first, 1)
    np.testing.assert_allclose(list(losses(runs.first, 0).values()), wanted, rtol=1e-5)


def test_goes_on_after_a_restart_as_if_there_had_been_none(runs: Runs) -> None:
    whole = losses(runs.first, 0)
    assert losses(runs.again, 0) == losses(runs.again, 1) == {i: whole[i] for i in range(HALF, END)}


def test_goes_on_in_another_number_of_processes(runs: Runs) -> None:
    step = ffjax.autoshard(train.train_step, strategy="fsdp", mesh={"x": 8})
    shapes = jax.eval_shape(train.init, jax.random.key(0))
    step.plan(shapes, two_processes.rows(0))
    state = checkpoint.restore(runs.folder / "saved", step.abstract_state(shapes))
    for i in range(HALF, END):
        state, loss = step(state, two_processes.rows(i))
        np.testing.assert_allclose(loss, losses(runs.first, 0)[i][0], rtol=1e-5)


def test_plans_come_from_any_cache_that_has_them(runs: Runs) -> None:
    """The second launch ends where a plan is searched; process 0 had lost one plan, and found the other damaged."""
    assert len(runs.plans) == 2
    assert "searched again" not in runs.again.errors
    assert re.search(r"\[0\] .*two_processes.py:\d+: FfjaxWarning: the cached plan cannot be used", runs.again.errors)
    for process in (0, 1):
        files = (runs.folder / f"plans {process}").iterdir()
        assert {file.name: file.read_text() for file in files} == runs.plans
    saved = checkpoint.saved_plan(runs.folder / "saved")
    assert saved.to_json() in {Plan.from_json(text).to_json() for text in runs.plans.values()}


def test_a_failure_beside_a_collective_ends_all_and_is_named(runs: Runs) -> None:
    """Process 0 is in the step that process 1 does not come to."""
    assert runs.again.status == 1
    assert re.search(r"\nffjax: process 1 ended by exit status 1 after [\d.]+ s; the other process", runs.again.errors)
    assert runs.again.errors.endswith(f"  ValueError: {DAMAGE}\n")
    assert "worker.py" not in runs.again.errors
    assert END not in losses(runs.again, 0)
