"""Processes that meet, differ, agree on a plan and fail: here as threads, with real sockets or a store of their own."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import ffjax
from ffjax import distributed
from ffjax.distributed import agreement, rendezvous
from ffjax.distributed.agreement import Asked, agreed_plan, program_text
from ffjax.distributed.key_value import KeyValueStore
from ffjax.distributed.rendezvous import Member, faults, meet, split_address
from ffjax.errors import BudgetError, DistributedError, FfjaxWarning, PlanError
from ffjax.ir.trace import trace
from ffjax.plan_cache import CachedPlan

VERSIONS = {"jax": "0.10.2", "ffjax": "0.1.0"}


def member(process_id: int, processes: int, host: str = "", **versions: str) -> Member:
    return Member(
        process_id=process_id, processes=processes, host=host or f"node-{process_id}", versions=VERSIONS | versions
    )


@pytest.fixture
def address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"127.0.0.1:{free.getsockname()[1]}"


def hello_of(me: Member) -> bytes:
    return json.dumps(dataclasses.asdict(me)).encode() + b"\n"


def met(address: str, *members: Member, timeout_s: float = 10.0, before: bytes = b"") -> list[str]:
    """What each is told: empty if all is well. Before any but the first, somebody says something and goes."""
    ended = threading.Event()

    def one(me: Member) -> str:
        try:
            meet(address, me, timeout_s=timeout_s)
        except DistributedError as error:
            return str(error)
        return ""

    def somebody() -> None:
        for connection in rendezvous._attempts(address, time.monotonic() + 5):
            with connection:
                connection.recv(1000)
                connection.sendall(before)
                return

    def jax_coordinator() -> None:
        """What listens after process 0 has met the others."""
        with socket.create_server(split_address(address)):
            ended.wait(10)

    with ThreadPoolExecutor(len(members) + 1) as pool:
        told = [pool.submit(one, members[0])]
        if before:
            somebody()
        told += [pool.submit(one, m) for m in members[1:]]
        if not told[0].result():
            pool.submit(jax_coordinator)
            for t in told[1:]:
                t.result()
            ended.set()
        return [t.result() for t in told]


# ---- meeting


def test_processes_meet_in_any_order(address: str) -> None:
    assert met(address, member(0, 3), member(2, 3), member(1, 3)) == ["", "", ""]


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (member(1, 3), r"process 1 \(on node-1\) was started as one of 3, process 0 \(on node-0\) as one of 2"),
        (member(1, 2, jax="0.9.0"), r"process 1 \(on node-1\) has jax 0.9.0, process 0 \(on node-0\) has 0.10.2"),
    ],
    ids=["count", "version"],
)
def test_all_are_told_who_differs_and_in_what(
    address: str, other: Member, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous, "_LINGER_S", 0.1)
    answers = met(address, member(0, 2), other)
    assert len(set(answers)) == 1
    with pytest.raises(DistributedError, match=told):
        raise DistributedError(answers[0])


def test_two_of_one_id() -> None:
    wrong = faults([member(0, 3), member(1, 3), member(1, 3, host="node-7")])
    assert "two came as process 1: on node-1 and on node-7" in wrong


def test_many_differences_are_counted_and_few_are_named() -> None:
    wrong = faults([member(0, 40), *(member(i, 40, jax="0.9.0") for i in range(1, 40))])
    assert wrong.count("has jax 0.9.0") == 8
    assert "and 31 more" in wrong


def test_who_is_missing_is_named_in_time(address: str) -> None:
    began = time.monotonic()
    answers = met(address, member(0, 4), member(2, 4), timeout_s=0.5)
    assert time.monotonic() - began < 5
    assert answers[0] == answers[1]
    assert f"of 4 processes 2 came to {address} within 0.5 s; missing: 1, 3" in answers[0]


def test_one_that_comes_again_takes_its_own_place(address: str) -> None:
    assert met(address, member(0, 3), member(1, 3), member(2, 3), before=hello_of(member(1, 3))) == ["", "", ""]


def test_one_that_went_is_missing(address: str) -> None:
    told = met(address, member(0, 3), member(2, 3), before=hello_of(member(1, 3)), timeout_s=1.0)
    assert "missing: 1" in told[0]


def test_what_is_no_process_of_the_run_is_ignored(address: str) -> None:
    assert met(address, member(0, 2), member(1, 2), before=b"GET / HTTP/1.1\r\n\r\n") == ["", ""]


def test_nobody_answers(address: str) -> None:
    began = time.monotonic()
    with pytest.raises(DistributedError, match=r"process 1 .* did not reach .* within 0.5 s: nothing answers there"):
        meet(address, member(1, 2), timeout_s=0.5)
    assert time.monotonic() - began < 5


def test_something_else_answers(address: str) -> None:
    with (
        socket.create_server(split_address(address)),
        pytest.raises(DistributedError, match=r"what answers there is no coordinator"),
    ):
        meet(address, member(1, 2), timeout_s=0.5)


def test_port_in_use(address: str) -> None:
    with (
        socket.create_server(split_address(address)),
        pytest.raises(DistributedError, match=r"port \d+ of this host.*is in use. Remedy: another port"),
    ):
        meet(address, member(0, 2), timeout_s=5)


@pytest.mark.parametrize("text", ["node-0", "node-0:", ":29400", "node-0:http", "node-0:70000"])
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(DistributedError, match="is no address. Remedy: host:port"):
        split_address(text)


def test_ids_count_from_zero(address: str) -> None:
    with pytest.raises(DistributedError, match="process 2 of 2: ids count from 0"):
        meet(address, member(2, 2), timeout_s=1)


def test_one_process_needs_nothing() -> None:
    assert not distributed.initialize()
    assert distributed.store() is None


# ---- the store


class FakeClient:
    """The coordinator's store, in this process."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.written = threading.Condition()

    def key_value_set_bytes(self, key: str, value: bytes, allow_overwrite: bool = False) -> None:
        with self.written:
            if key in self.values:
                raise jax.errors.JaxRuntimeError(f"ALREADY_EXISTS: key {key} already exists.")
            self.values[key] = value
            self.written.notify_all()

    def blocking_key_value_get_bytes(self, key: str, timeout_in_ms: int) -> bytes:
        with self.written:
            if not self.written.wait_for(lambda: key in self.values, timeout_in_ms / 1000):
                raise jax.errors.JaxRuntimeError(f"DEADLINE_EXCEEDED: GetKeyValue() timed out with key: {key}")
            return self.values[key]


def test_store_writes_once_and_waits_no_longer_than_asked() -> None:
    store = KeyValueStore(FakeClient())
    assert store.put("a", "é" * 1000)
    assert not store.put("a", "other")
    assert store.get("a", 1.0) == "é" * 1000
    assert store.get("b", 0.05) is None


# ---- one plan for all


def step(state: jax.Array, batch: jax.Array) -> tuple[jax.Array, jax.Array]:
    return state - 0.1 * (batch @ state).sum(), batch.sum()


def other_step(state: jax.Array, batch: jax.Array) -> tuple[jax.Array, jax.Array]:
    return state - 0.2 * (batch @ state).sum(), batch.sum()


ARGS = (jax.ShapeDtypeStruct((8,), jnp.float32), jax.ShapeDtypeStruct((16, 8), jnp.float32))


@pytest.fixture
def as_processes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Runs functions as the processes of one run, each in a thread; what each returns or raises."""
    client, here = FakeClient(), threading.local()
    monkeypatch.setattr(agreement, "_numbers", iter([0] * 99))
    monkeypatch.setattr(jax, "process_index", lambda: here.index)
    monkeypatch.setattr(distributed, "store", lambda: KeyValueStore(client))
    monkeypatch.setattr(distributed, "timeout_s", lambda: 0.5)

    def run(*functions: Callable[[], Any]) -> list[Any]:
        monkeypatch.setattr(jax, "process_count", lambda: len(functions))

        def one(index: int) -> Any:
            here.index = index
            try:
                return functions[index]()
            except Exception as error:
                return error

        with ThreadPoolExecutor(len(functions)) as pool:
            return list(pool.map(one, range(len(functions))))

    return run


def planning(
    fn: Callable[..., Any], search: Callable[[], ffjax.Plan], cache: Path | None = None, **options: object
) -> Callable[[], ffjax.Plan]:
    program = trace(fn, ARGS)
    cached = cache and CachedPlan(path=cache)
    return lambda: agreed_plan(program, options, search=search, bind=lambda plan: plan, cached=cached)


def never() -> ffjax.Plan:
    raise AssertionError("searches in more than one process")


def searched() -> ffjax.Plan:
    return ffjax.plan(step, *ARGS, cluster=ffjax.Cluster.named("cpu"))


def test_one_searches_and_all_have_the_same_plan(as_processes: Callable[..., list[Any]]) -> None:
    found = as_processes(planning(step, searched), planning(step, never), planning(step, never))
    assert len({plan.to_json() for plan in found}) == 1


def test_a_plan_is_searched_where_no_cache_has_it(as_processes: Callable[..., list[Any]], tmp_path: Path) -> None:
    own = [tmp_path / "0.json", tmp_path / "1.json", tmp_path / "2.json"]
    (plan, *_) = as_processes(planning(step, searched, own[0]), *(planning(step, never, path) for path in own[1:]))
    assert [ffjax.Plan.load(path).to_json() for path in own] == [plan.to_json()] * 3

    found = as_processes(*(planning(step, never, path) for path in own))
    assert [p.to_json() for p in found] == [plan.to_json()] * 3


@pytest.mark.parametrize("damaged", [0, 1])
def test_a_plan_is_taken_from_any_cache_that_has_it(
    damaged: int, as_processes: Callable[..., list[Any]], tmp_path: Path
) -> None:
    own = [tmp_path / "0.json", tmp_path / "1.json", tmp_path / "2.json", tmp_path / "3.json"]
    plan = searched()
    for path in own[damaged], own[2], own[3]:  # and one of the first two has none
        plan.save(path)
    own[damaged].write_text(plan.to_json()[:1000])
    with pytest.warns(FfjaxWarning, match="the cached plan cannot be used and is replaced: .*damaged"):
        found = as_processes(*(planning(step, never, path) for path in own))
    assert [p.to_json() for p in found] == [plan.to_json()] * 4
    assert [ffjax.Plan.load(path).to_json() for path in own] == [plan.to_json()] * 4


def test_a_cached_plan_that_does_not_come_is_an_error_everywhere(
    as_processes: Callable[..., list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched().save(tmp_path / "1.json")
    put = KeyValueStore.put
    monkeypatch.setattr(KeyValueStore, "put", lambda self, key, text: "plan of" in key or put(self, key, text))
    paths = [tmp_path / "0.json", tmp_path / "1.json", tmp_path / "2.json"]
    told = as_processes(*(planning(step, never, path) for path in paths))
    assert "process 1 has the plan in its cache, but did not give it within 0.5 s" in str(told[0])
    assert str(told[2]) == str(told[0])


def test_other_code_is_an_error_everywhere_that_says_what_differs(as_processes: Callable[..., list[Any]]) -> None:
    told = as_processes(planning(step, never), planning(other_step, never))
    assert [type(t) for t in told] == [DistributedError] * 2
    assert str(told[0]) == str(told[1])
    assert "process 1 (on " in str(told[0])
    assert "step is other_step, in process 0 step" in str(told[0])
    assert "0.2" in str(told[0])


def test_other_options_are_an_error_everywhere(as_processes: Callable[..., list[Any]]) -> None:
    told = as_processes(planning(step, never, strategy="auto"), planning(step, never, strategy="fsdp"))
    assert all("strategy is fsdp, in process 0 auto" in str(t) for t in told)


def test_an_error_of_the_search_reaches_all_at_once(as_processes: Callable[..., list[Any]]) -> None:
    def fails() -> ffjax.Plan:
        raise BudgetError("no plan fits 1KiB")

    told = as_processes(planning(step, fails), planning(step, never))
    assert [(type(t), str(t)) for t in told] == [(BudgetError, "no plan fits 1KiB")] * 2


def test_a_crash_of_the_search_reaches_all_at_once(as_processes: Callable[..., list[Any]]) -> None:
    told = as_processes(planning(step, lambda: 1 / 0), planning(step, never))  # type: ignore[arg-type, return-value]
    assert isinstance(told[0], ZeroDivisionError)
    assert isinstance(told[1], DistributedError)
    assert "raised ZeroDivisionError: division by zero" in str(told[1])


def test_one_that_does_not_come_to_the_plan_is_named(as_processes: Callable[..., list[Any]]) -> None:
    told = as_processes(planning(step, never), planning(step, never), lambda: "elsewhere")
    assert str(told[0]) == str(told[1])
    assert "process 0 plans step, but process 2 did not within 0.5 s" in str(told[0])


def test_process_0_that_does_not_come_to_the_plan(as_processes: Callable[..., list[Any]]) -> None:
    told = as_processes(lambda: "elsewhere", planning(step, never))
    assert "plans step, but process 0 did not within 0.5 s" in str(told[1])


def test_program_text_is_of_the_program_alone() -> None:
    def noisy(state: jax.Array, batch: jax.Array) -> tuple[jax.Array, jax.Array]:
        jax.debug.callback(lambda x: None, batch)  # its address differs between processes
        return step(state, batch)

    text = program_text(trace(noisy, ARGS))
    assert not re.search("0x[0-9a-f]", text)
    assert text.startswith("state: float32[8]\nbatch: float32[16,8]\n")
    assert program_text(trace(step, ARGS)) != program_text(trace(other_step, ARGS))


def test_sets_are_written_in_one_order() -> None:
    found = [
        agreement._SET.sub(agreement._sorted_set, text) for text in ("frozenset({'y', 'x'})", "frozenset({'x', 'y'})")
    ]
    assert found[0] == found[1] == "frozenset({'x', 'y'})"


def test_asked_compares_each_fact() -> None:
    first = Asked(host="a", facts={"jax": "0.10.2", "devices": "4 x cpu"}, program="p")
    assert not Asked(host="b", facts=dict(first.facts), program="p").differs(first)
    other = Asked(host="b", facts={"jax": "0.10.2", "devices": "2 x cpu"}, program="p")
    assert other.differs(first) == "devices is 2 x cpu, in process 0 4 x cpu"


# ---- plans in files that processes share


def test_plans_are_written_whole_under_readers(tmp_path: Path) -> None:
    plan = searched()
    path = tmp_path / "plan.json"
    plan.save(path)
    stop = time.monotonic() + 1.0

    def write() -> int:
        count = 0
        while time.monotonic() < stop:
            plan.save(path)
            count += 1
        return count

    def read() -> int:
        count = 0
        while time.monotonic() < stop:
            assert ffjax.Plan.load(path) == plan
            count += 1
        return count

    with ThreadPoolExecutor(4) as pool:
        counts = [t.result() for t in [pool.submit(f) for f in (write, write, read, read)]]
    assert min(counts) > 1
    assert os.listdir(tmp_path) == ["plan.json"]


def test_a_plan_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        searched().save(tmp_path / "plan.json")
    assert not list(tmp_path.iterdir())


def test_a_plan_is_read_as_data_only(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(b"\x80\x04\x95cposix\nsystem\n")  # a pickle
    with pytest.raises(PlanError, match="damaged"):
        ffjax.Plan.load(path)
