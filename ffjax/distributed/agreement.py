"""One plan for all processes of a run: process 0 has it searched, the others take it, or all stop and say who differs.

Through the key-value store, for the n-th plan of the run: process 0 writes what it plans, `asked`; each other compares
that with its own, and answers how it `differs`, and whether its own cache `has` the plan, `answer/<id>`; process 0 then
writes the `plan`, or which process shall, `plan of <id>`, or what is wrong. So whatever happens in time is known to
all, and each wait has a limit.
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
from ffjax.distributed.key_value import KeyValueStore
from ffjax.errors import DistributedError, FfjaxError
from ffjax.ir.trace import Program
from ffjax.plan import Plan
from ffjax.plan_cache import CachedPlan

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
    program: Program,
    options: Mapping[str, object],
    *,
    search: Callable[[], Plan],
    bind: Callable[[Plan], Plan],
    cached: CachedPlan | None = None,
) -> Plan:
    """The plan that all processes of this run use: from process 0's cache, or another's, or searched.

    Args:
      program: that is planned.
      options: what else all must ask for alike, by the names that errors use.
      search: called in process 0, or in a process alone, where no process has the plan.
      bind: puts a plan on the program.
      cached: the plan's place in this process's cache, where it is afterwards; a folder of its own, or shared by all.

    Raises, in all processes alike: what `search` raises; DistributedError that says which process differs and in what,
    or which has not asked for this plan in time.
    """
    store = distributed.store()
    known = None if cached is None else cached.read(bind)
    if store is None:
        plan = known or search()
    else:
        asked = _asked(program, options)
        prefix = f"ffjax/plan/{next(_numbers)}"
        if jax.process_index() == 0:
            plan = _lead(store, prefix, asked, known, bind, search)
        else:
            plan = _follow(store, prefix, asked, known, bind)
    if cached is not None and known is None:
        cached.keep(plan)
    return plan


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


def _lead(
    store: KeyValueStore,
    prefix: str,
    asked: Asked,
    known: Plan | None,
    bind: Callable[[Plan], Plan],
    search: Callable[[], Plan],
) -> Plan:
    try:
        store.put(f"{prefix}/asked", json.dumps(dataclasses.asdict(asked)))
        others = _answers(store, prefix, asked)
        if known is None and others:
            store.put(f"{prefix}/plan", json.dumps({"of": others[0]}))
            return bind(_plan_of(store, prefix, others[0]))
        plan = known or search()
    except BaseException as error:
        kind = type(error).__name__
        said = f"process 0 (on {asked.host}), which searches, raised {kind}: {error}. Remedy: see its log."
        if isinstance(error, FfjaxError):
            said = str(error)
        store.put(f"{prefix}/plan", json.dumps({"kind": kind, "error": said}))
        raise
    store.put(f"{prefix}/plan", json.dumps({"plan": plan.to_json()}))
    return plan


def _answers(store: KeyValueStore, prefix: str, asked: Asked) -> list[int]:
    """The processes whose caches have the plan; raises DistributedError unless all have asked for the same."""
    limit_s = distributed.timeout_s()
    deadline = distributed.deadline(limit_s)
    wrong = []
    absent = []
    have = []
    for other in range(1, jax.process_count()):
        said = store.get(f"{prefix}/answer/{other}", max(deadline(), 0.01))
        if said is None:
            absent.append(str(other))
            continue
        answer = json.loads(said)
        if answer["differs"]:
            wrong.append(f"process {other} {answer['differs']}")
        if answer["has"]:
            have.append(other)
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
    return have


def _follow(store: KeyValueStore, prefix: str, asked: Asked, known: Plan | None, bind: Callable[[Plan], Plan]) -> Plan:
    limit_s = distributed.timeout_s()
    me = f"process {jax.process_index()} (on {asked.host})"
    first = store.get(f"{prefix}/asked", limit_s)
    if first is None:
        raise DistributedError(
            f"{me} plans {asked.facts['step']}, but process 0 did not within {limit_s:g} s. Remedy: call the step, or "
            "its plan, in all processes and in the same order; a longer timeout if some come late."
        )
    differs = asked.differs(Asked(**json.loads(first)))
    answer = {"differs": differs and f"(on {asked.host}): {differs}", "has": known is not None}
    store.put(f"{prefix}/answer/{jax.process_index()}", json.dumps(answer))
    said = store.get(f"{prefix}/plan", SEARCH_S + limit_s)
    if said is None:
        raise DistributedError(
            f"{me} got no plan of {asked.facts['step']} from process 0 within {SEARCH_S + limit_s:g} s. Remedy: plan "
            "with ffjax.plan beforehand, and run with plan=."
        )
    content = json.loads(said)
    if "error" in content:
        raise getattr(ffjax.errors, content["kind"], DistributedError)(content["error"])
    if "plan" in content:
        return bind(Plan.from_json(content["plan"], "of process 0"))
    if known is not None and content["of"] == jax.process_index():
        store.put(f"{prefix}/plan of {content['of']}", known.to_json())
        return known
    return bind(_plan_of(store, prefix, content["of"]))


def _plan_of(store: KeyValueStore, prefix: str, process: int) -> Plan:
    """What another process has in its cache, once it has written it."""
    limit_s = distributed.timeout_s()
    text = store.get(f"{prefix}/plan of {process}", limit_s)
    if text is None:
        raise DistributedError(
            f"process {process} has the plan in its cache, but did not give it within {limit_s:g} s. Remedy: see its "
            "log."
        )
    return Plan.from_json(text, f"of process {process}")


def _first_difference(ours: str, theirs: str) -> str:
    for mine, other in itertools.zip_longest(ours.splitlines(), theirs.splitlines(), fillvalue="nothing"):
        if mine != other:
            return f"its program has `{' '.join(mine.split())}`, in process 0 `{' '.join(other.split())}`"
    return "its program is written in another way"
