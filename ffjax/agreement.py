"""One plan for all processes of a run: process 0 has it searched, the others take it, or all stop and say who differs.

Through the key-value store, for the n-th plan of the run: process 0 writes what it plans, `asked`; each other compares
that with its own, and writes how it differs, `differs/<id>`, empty where it does not; process 0 then writes the `plan`
or what is wrong. So whatever happens in time is known to all, and each wait has a limit.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax

import ffjax.errors
from ffjax import distributed
from ffjax.errors import DistributedError, FfjaxError
from ffjax.ir.trace import Program
from ffjax.key_value import KeyValueStore
from ffjax.plan import Plan

SEARCH_S = 3600.0
"""How long the others wait for process 0's search. If process 0 dies they end at once."""
_MOST_NAMED = 8
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_SET = re.compile(r"\{('[^{}]*')\}")

_numbers = itertools.count()
"""Of the plans of this run, in the order in which they are asked for: the same in all processes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a process asks a plan for."""

    host: str
    facts: Mapping[str, str]
    """What must be equal, each under the name that an error calls it."""
    program: str
    """As text, equal for equal programs."""

    def differs(self, first: Asked) -> str:
        """How this is other than what process 0 asks; empty if it is not."""
        wrong = [
            f"{name} is {self.facts.get(name)}, in process 0 {value}"
            for name, value in first.facts.items()
            if self.facts.get(name) != value
        ]
        if self.program != first.program:
            wrong.append(_first_difference(self.program, first.program))
        return "; ".join(wrong)


def agreed_plan(
    program: Program, options: Mapping[str, object], *, find: Callable[[], Plan], bind: Callable[[Plan], Plan]
) -> Plan:
    """The plan that all processes of this run use; with one process, what it finds.

    Args:
      program: that is planned.
      options: what else all must ask for alike, by the names that errors use.
      find: searches or loads the plan; called in process 0 only.
      bind: puts a plan on the program, in the others.

    Raises, in all processes alike: what `find` raises; DistributedError that says which process differs and in what, or
    which has not asked for this plan in time.
    """
    store = distributed.store()
    if store is None:
        return find()
    asked = _asked(program, options)
    prefix = f"ffjax/plan/{next(_numbers)}"
    if jax.process_index() == 0:
        return _lead(store, prefix, asked, find)
    return bind(Plan.from_json(_follow(store, prefix, asked), "of process 0"))


def _asked(program: Program, options: Mapping[str, object]) -> Asked:
    local = jax.local_devices()
    facts = {
        "step": program.name,
        "devices": f"{len(local)} x {local[0].device_kind} of {jax.device_count()}",
        **distributed.versions(),
        **{name: str(value) for name, value in options.items()},
    }
    return Asked(host=socket.gethostname(), facts=facts, program=program_text(program))


def program_text(program: Program) -> str:
    """The program as text: arguments and equations with all literals, without what differs between processes."""
    leaves = "\n".join(map(str, program.args))
    text = _ADDRESS.sub("", f"{leaves}\n{program.jaxpr}")
    return _SET.sub(_sorted_set, text)


def _sorted_set(found: re.Match[str]) -> str:
    """Sets of texts are written in an order that differs between processes."""
    return "{" + ", ".join(sorted(found[1].split(", "))) + "}"


def _lead(store: KeyValueStore, prefix: str, asked: Asked, find: Callable[[], Plan]) -> Plan:
    try:
        store.put(f"{prefix}/asked", json.dumps(dataclasses.asdict(asked)))
        _check_others(store, prefix, asked)
        plan = find()
    except BaseException as error:
        kind = type(error).__name__
        said = f"process 0 (on {asked.host}), which searches, raised {kind}: {error}. Remedy: see its log."
        if isinstance(error, FfjaxError):
            said = str(error)
        store.put(f"{prefix}/plan", json.dumps({"kind": kind, "error": said}))
        raise
    store.put(f"{prefix}/plan", json.dumps({"plan": plan.to_json()}))
    return plan


def _check_others(store: KeyValueStore, prefix: str, asked: Asked) -> None:
    limit_s = distributed.timeout_s()
    deadline = distributed.deadline(limit_s)
    wrong = []
    absent = []
    for other in range(1, jax.process_count()):
        said = store.get(f"{prefix}/differs/{other}", max(deadline(), 0.01))
        if said is None:
            absent.append(str(other))
        elif said:
            wrong.append(f"process {other} {said}")
    if wrong:
        more = f"; and {len(wrong) - _MOST_NAMED} more" if len(wrong) > _MOST_NAMED else ""
        raise DistributedError(
            f"the processes of this run do not plan the same: {'; '.join(wrong[:_MOST_NAMED])}{more}. Process 0 is on "
            f"{asked.host}. Remedy: run the same code with the same options in all processes."
        )
    if absent:
        named = ", ".join(absent[:_MOST_NAMED]) + (", ..." if len(absent) > _MOST_NAMED else "")
        raise DistributedError(
            f"process 0 plans {asked.facts['step']}, but process {named} did not within {limit_s:g} s. Remedy: call "
            "the step, or its plan, in all processes and in the same order; a longer timeout if some come late."
        )


def _follow(store: KeyValueStore, prefix: str, asked: Asked) -> str:
    limit_s = distributed.timeout_s()
    me = f"process {jax.process_index()} (on {asked.host})"
    first = store.get(f"{prefix}/asked", limit_s)
    if first is None:
        raise DistributedError(
            f"{me} plans {asked.facts['step']}, but process 0 did not within {limit_s:g} s. Remedy: call the step, or "
            "its plan, in all processes and in the same order; a longer timeout if some come late."
        )
    differs = asked.differs(Asked(**json.loads(first)))
    store.put(f"{prefix}/differs/{jax.process_index()}", f"(on {asked.host}): {differs}" if differs else "")
    said = store.get(f"{prefix}/plan", SEARCH_S + limit_s)
    if said is None:
        raise DistributedError(
            f"{me} got no plan of {asked.facts['step']} from process 0 within {SEARCH_S + limit_s:g} s. Remedy: plan "
            "with ffjax.plan beforehand, and run with plan=."
        )
    content: dict[str, str] = json.loads(said)
    if "error" in content:
        raise getattr(ffjax.errors, content["kind"], DistributedError)(content["error"])
    return content["plan"]


def _first_difference(ours: str, theirs: str) -> str:
    for mine, other in itertools.zip_longest(ours.splitlines(), theirs.splitlines(), fillvalue="nothing"):
        if mine != other:
            return f"its program has `{' '.join(mine.split())}`, in process 0 `{' '.join(other.split())}`"
    return "its program is written in another way"
