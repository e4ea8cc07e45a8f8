"""Plans as text: why a plan is what it is, and how two plans differ."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from ffjax.cost.simulation.limits import FasterLink, Limits
from ffjax.ir.compat import AS_WRITTEN
from ffjax.ir.spec import format_spec
from ffjax.plan_record import Decision, Placement, PlanRecord
from ffjax.units import bytes_text, seconds_text

MOST_LINES = 10


def explain(plan: PlanRecord, *, details: bool = False) -> str:
    """One page: the plan's figures, its state, what costs most and what the alternatives would have cost."""
    figures, search = plan.estimate, plan.search
    limit = None if details else MOST_LINES
    lines = [
        f"{plan.program} on {plan.devices} devices of {plan.cluster!r}, "
        f"mesh {plan.mesh_shape}, strategy {plan.strategy}"
        + (f", remat {plan.remat}" if search.remat or plan.remat != AS_WRITTEN else ""),
        f"  step {seconds_text(figures.step_s)} = compute {seconds_text(figures.compute_s)} "
        f"+ exposed communication {seconds_text(figures.exposed_comm_s)}, "
        f"of {seconds_text(figures.comm_s)} communication in all",
        f"  peak {bytes_text(figures.peak_bytes)} of {bytes_text(plan.budget_bytes)} per device",
        f"  found by {search.algorithm} in {search.seconds.get('total', 0.0):.1f} s; {search.stop}",
        f"  bound: no plan on this mesh has a sum of costs (kernels and collectives, as far as they were taken to be "
        f"exposed) below {seconds_text(search.lower_bound_s)};",
        f"  gap: so at most {search.gap:.2%} of this plan's sum can be gained there",
        *([f"  measured costs from {plan.profile}"] if plan.profile else []),
        *([f"  seconds are {_shares(figures.sources)}"] if plan.profile or details else []),
        *([] if plan.limits is None else ["", *_limits(plan, plan.limits)]),
        "",
        "collectives of one step, per device",
    ]
    lines += table(
        [
            (
                c.kind,
                "*".join(c.axes),
                f"{c.count:g} x",
                bytes_text(c.bytes),
                seconds_text(c.seconds),
                "the step's own" * c.user,
            )
            for c in figures.collectives[:limit]
        ],
        empty="none",
    )
    lines += ["", "arguments"]
    lines += table([(path, count, spec) for path, count, spec in _collapsed(plan.args)][:limit], empty="none")
    hot = sorted(plan.decisions, key=lambda d: -d.seconds)
    less = any(d.runner_up and d.runner_up_extra_s < 0 for d in plan.decisions)
    lines += [
        "",
        "what costs most, and the runner-up: what it would add to the step (all members of a family together)",
        *(
            ["  (-: less as a sum of costs; this plan hides more of its communication, or the other does not fit)"]
            * less
        ),
    ]
    lines += table(
        [
            (seconds_text(d.seconds), f"{d.members} x", _split(d), d.what, short_source(d.where), _runner_up(d))
            for d in ([d for d in hot if d.runner_up or details][:limit])
        ],
        empty="nothing has another way",
    )
    close = sorted((d for d in plan.decisions if d.runner_up), key=lambda d: d.runner_up_extra_s)
    if details:
        lines += ["", "closest calls"]
        lines += table(
            [(_split(d), d.what, short_source(d.where), _runner_up(d)) for d in close[:MOST_LINES]], empty="none"
        )
    lines += ["", "largest arrays alive at the peak"]
    lines += table([(bytes_text(size), what) for what, size in figures.largest[:6]], empty="none")
    lines += ["", "the strategies, each on its best mesh"]
    best: dict[str, tuple[str, ...]] = {}
    for c in sorted(search.competitors, key=lambda c: (not c.fits, c.step_s)):
        row = (c.strategy, c.mesh, seconds_text(c.step_s), bytes_text(c.peak_bytes), "" if c.fits else "does not fit")
        best.setdefault(c.strategy, row)
    lines += table(list(best.values()), empty="none")
    if search.remat:
        lines += ["", "what jax.checkpoint regions keep: the best plan under each policy"]
        lines += table(
            [
                (
                    v.policy,
                    v.strategy,
                    v.mesh,
                    seconds_text(v.step_s),
                    bytes_text(v.peak_bytes),
                    "taken" if v.policy == plan.remat else "" if v.fits else "does not fit",
                )
                for v in search.remat
            ],
            empty="none",
        )
    if search.finalists:
        lines += ["", "compiled before deciding: predicted, as compiled"]
        lines += table(
            [
                (
                    f.strategy,
                    f.mesh,
                    f"{seconds_text(f.step_s)}, {seconds_text(f.compiled_step_s)}",
                    f"{bytes_text(f.peak_bytes)}, {bytes_text(f.compiled_peak_bytes)}",
                    "" if f.fits else "does not fit",
                )
                for f in search.finalists
            ],
            empty="none",
        )
    return "\n".join(lines) + "\n"


def _limits(plan: PlanRecord, limits: Limits) -> list[str]:
    """The busiest stream, and what a faster network or more memory would change."""
    faster = {link.link: link for link in limits.links}
    rows = []
    for s in limits.streams:
        link = faster.get(s.stream)
        saved = "" if link is None else _saved(link)
        exposed = f"{seconds_text(s.exposed_s)} exposed" if link is not None else ""
        rows.append(
            (
                s.stream,
                f"{seconds_text(s.busy_s)} busy",
                exposed,
                saved,
                "<- bottleneck" * (s.stream == limits.bottleneck),
            )
        )
    if limits.memory is None:
        more = "more would change nothing that is known"
    else:
        m = limits.memory
        more = (
            f"binds: at the margin a GiB more on each device is worth {seconds_text(m.saved_s_per_gib)} of a "
            f"step; with {bytes_text(m.peak_bytes)} it would take {seconds_text(m.step_s)}"
        )
    return [
        "what the step waits for, per device, and what more of it would save (this plan, simulated again)",
        *table(rows, empty="nothing"),
        f"  memory: {bytes_text(plan.budget_bytes)}; {more}",
    ]


def _saved(link: FasterLink) -> str:
    tenth, twice = (_or_nothing(s) for s in (link.saved_by_tenth_s, link.saved_by_twice_s))
    return f"10% faster: {tenth}, twice as fast: {twice}"


def _or_nothing(saved_s: float) -> str:
    return "nothing" if abs(saved_s) < 1e-9 else f"{seconds_text(-saved_s)}"


def diff(a: PlanRecord, b: PlanRecord) -> str:
    """One line for each thing that differs between two plans, `-` before and `+` after."""
    lines: list[str] = []

    def change(what: str, before: object, after: object) -> None:
        if before != after:
            lines.extend([f"- {what}: {before}", f"+ {what}: {after}"])

    change("program", a.program, b.program)
    change("fingerprint", a.fingerprint, b.fingerprint)
    change("remat", a.remat, b.remat)
    change("mesh", a.mesh_shape, b.mesh_shape)
    for side, before, after in (("", a.args, b.args), ("result ", a.results, b.results)):
        left, right = ({p.path: _placed(p) for p in placements} for placements in (before, after))
        for path in dict.fromkeys([*left, *right]):
            change(side + path, left.get(path, "absent"), right.get(path, "absent"))
    for one, two in _pairs(a.decisions, b.decisions):
        named = one or two
        assert named is not None  # a pair has one of them
        change(
            f"{named.what} at {short_source(named.where)} ({named.members} x)",
            "absent" if one is None else _split(one),
            "absent" if two is None else _split(two),
        )
    if lines:
        change("step", seconds_text(a.estimate.step_s), seconds_text(b.estimate.step_s))
        change("peak", bytes_text(a.estimate.peak_bytes), bytes_text(b.estimate.peak_bytes))
    return "\n".join(lines) + "\n" * bool(lines)


def _pairs(before: Iterable[Decision], after: Iterable[Decision]) -> Iterable[tuple[Decision | None, Decision | None]]:
    """Decisions of two plans for the same ops: of one key, or else, as keys also say what is around, of one line."""
    left, right = ({d.key: d for d in decisions} for decisions in (before, after))
    others: dict[tuple[str, str], list[Decision]] = {}
    for d in right.values():
        if d.key not in left:
            others.setdefault((d.where, d.what), []).append(d)
    for key, d in left.items():
        same = others.get((d.where, d.what))
        yield d, right[key] if key in right else same.pop(0) if same else None
    yield from ((None, d) for rest in others.values() for d in rest)


def _shares(sources: Mapping[str, float]) -> str:
    return ", ".join(f"{share:.0%} {source}" for source, share in sources.items()) or "none"


def _placed(placement: Placement) -> str:
    return f"{placement.dtype}{list(placement.shape)} {format_spec(placement.spec)}"


def _collapsed(placements: Sequence[Placement]) -> Iterable[tuple[str, str, str]]:
    """Arguments that differ only in numbers in their paths (layers) as one line."""
    groups: dict[tuple[str, str], int] = {}
    for p in placements:
        key = (re.sub(r"\d+", "*", p.path), _placed(p))
        groups[key] = groups.get(key, 0) + 1
    return [(path, f"{count} x", placed) for (path, placed), count in groups.items()]


def _split(decision: Decision) -> str:
    parts = [
        f"{axis}:{factor}={decision.factors[factor]}"
        + (f"->dim {decision.scatter[axis]}" if axis in decision.scatter else "")
        for axis, factor in decision.split.items()
    ]
    return " ".join(parts) or "whole"


def _runner_up(decision: Decision) -> str:
    if not decision.runner_up:
        return "no other"
    extra_s = decision.runner_up_extra_s
    return f"else {decision.runner_up}: {'-' if extra_s < 0 else '+'}{seconds_text(abs(extra_s))}"


def short_source(where: str) -> str:
    """The last two parts of a source path; argument paths stay."""
    file, colon, line = where.rpartition(":")
    return "/".join(file.split("/")[-2:]) + colon + line if colon and line.isdigit() else where


def table(rows: Sequence[tuple[str, ...]], *, empty: str) -> list[str]:
    if not rows:
        return [f"  {empty}"]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
