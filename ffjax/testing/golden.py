"""Golden plans: what a plan decides, as text that is committed, reviewed and compared in tests."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ffjax.explain import table
from ffjax.ir.spec import format_spec
from ffjax.plan import Plan
from ffjax.plan_record import Placement
from ffjax.units import bytes_text, seconds_text

UPDATE = "pytest --ffjax-update-plans"

_updating = False


def update_plans(update: bool) -> None:
    """Whether `assert_plan_matches` writes instead of comparing, as `pytest --ffjax-update-plans` asks it to."""
    global _updating
    _updating = update


def assert_plan_matches(plan: Plan, golden: str | os.PathLike[str], *, update: bool | None = None) -> None:
    """Checks that a plan decides what a committed text says: mesh, shardings of state and results, collectives.

    The text has no source lines, no seconds and no exact figures, so that it changes only where the plan does. Its
    comments (`#`) say what was predicted when it was written; they are not compared.

    Args:
        plan: plan for a cluster by name, so that the test is the same on every machine.
        golden: the file's path; best beside the test: `Path(__file__).with_name("train_step.plan")`.
        update: writes the file; by default where pytest runs with `--ffjax-update-plans`.

    Raises:
        AssertionError: shows what differs, and how to accept it.
    """
    file = Path(golden)
    text = plan_text(plan)
    if _updating if update is None else update:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        return
    try:
        before = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise AssertionError(
            f"there is no golden plan {os.fspath(file)!r} yet. Review this plan, and write it with {UPDATE}:\n\n{text}"
        ) from None
    lines, found = _compared(before), _compared(text)
    if lines != found:
        changed = difflib.unified_diff(lines, found, f"{file.name}, committed", "the plan found", n=2, lineterm="")
        raise AssertionError(
            "\n".join(
                [
                    f"the plan of {plan.program} is not that of {os.fspath(file)!r}:",
                    *changed,
                    "",
                    *(f"was {line.removeprefix('# ')}" for line in before.splitlines() if "predicted" in line),
                    *(f"now {line.removeprefix('# ')}" for line in text.splitlines() if "predicted" in line),
                    f"If the plan is meant to change: {UPDATE}, and commit the file.",
                ]
            )
        )


def plan_text(plan: Plan) -> str:
    """What a plan decides, without what differs between machines and versions; see `assert_plan_matches`.

    Arguments and results that differ only in the numbers of their paths (layers) and are sharded alike share a line.
    """
    estimate = plan.estimate
    totals = sorted(estimate.collectives, key=lambda c: (c.kind, c.axes))
    moved = [(c.kind, "*".join(c.axes), f"{c.count:g} x", bytes_text(c.bytes)) for c in totals]
    return "\n".join(
        [
            f"# A plan of ffjax: (x, -) is split over mesh axis x, whole in the second dimension. Written by {UPDATE}",
            f"# predicted: step {seconds_text(estimate.step_s)}, peak {bytes_text(estimate.peak_bytes)} per device",
            f"program {plan.program}",
            f"cluster {plan.cluster}, {plan.devices} devices",
            "mesh " + ", ".join(f"{axis}={size}" for axis, size in plan.mesh_shape.items()),
            *("", "arguments", *table(list(_placements(plan.args)), empty="none")),
            *("", "results", *table(list(_placements(plan.results)), empty="none")),
            *("", "collectives of one step, per device", *table(moved, empty="none"), ""),
        ]
    )


def _placements(placements: Sequence[Placement]) -> Iterator[tuple[str, str, str]]:
    """Path, type and sharding of each; layers that are alike as one, with `*` for their numbers."""
    groups: dict[str, list[Placement]] = {}
    for p in placements:
        groups.setdefault(re.sub(r"\d+", "*", p.path), []).append(p)
    for group in groups.values():
        alike = len({(p.shape, p.dtype, p.spec) for p in group}) == 1
        for p in group[:1] if alike else group:
            path = _common([each.path for each in group]) if alike else p.path
            yield path, f"{p.dtype}{list(p.shape)}".replace(" ", ""), format_spec(p.spec)


def _common(paths: Sequence[str]) -> str:
    """Paths that differ in numbers only as one.

    >>> _common(["params/layer1/0", "params/layer2/0"])
    'params/layer*/0 (2 x)'
    """
    split: list[list[str]] = [re.split(r"(\d+)", path) for path in paths]
    path = "".join(each[0] if len(set(each)) == 1 else "*" for each in zip(*split, strict=True))
    return f"{path} ({len(paths)} x)" if len(paths) > 1 else path


def _compared(text: str) -> list[str]:
    return [line.rstrip() for line in text.splitlines() if not line.startswith("#")]
