"""`ffjax launch`: the processes of a run on this host, started, listened to, and ended together.

Each process is a session of its own, so that what it starts ends with it. A pipe that nobody writes tells it when the
launcher is gone, however it was ended: no process is left behind.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import BinaryIO

from ffjax.distributed import ENDED, LOST_S, START_S, detected
from ffjax.distributed.rendezvous import split_address
from ffjax.distributed.worker import Start

GRACE_S = 10.0
"""What processes have to end by themselves when the launcher is told to; a second signal ends them at once."""
_SETTLE_S = 1.0
"""When one has failed by itself: the others' time to say what they have to."""
_BLAMING_S = 3.0
"""When one has ended because of another: the time for the other to be seen, if it is on this host."""
_KEPT, _SHOWN = 200, 25
"""Lines of what a process said last."""
_LOGGED = re.compile(r"[EFIW]\d{4} \d\d:")
"""A line of C++'s log."""
_NOISE = re.compile(rb"\[Gloo\]|connected peer ranks|is connected to \d+ peer|^\s+@\s+0x[0-9a-f]+ ")
"""What gloo prints to standard output, and frames of C++ below JAX's own error messages."""
_ENDED_BY_JAX = "JAX distributed service detected fatal errors"
_SILENT = re.compile(r"stopped sending heartbeats\):?\s*([\d, ]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What to run on this host, as its part of a run."""

    command: Sequence[str]
    """A script, or a module's name, and its arguments."""
    module: bool = False
    processes: int | None = None
    """On this host; None for one, which joins the run that JAX detects, if it does."""
    devices: int | None = None
    """Of each process; None for all, or for one where there are several processes."""
    cpu: bool = False
    """Fake CPU devices in place of accelerators."""
    coordinator: str | None = None
    """`host:port` of process 0; None for this host alone, or as detected."""
    nodes: int = 1
    node_rank: int = 0
    detect: str | None = None
    """JAX's name for the way to detect it; None for any."""
    timeout_s: float = START_S
    lost_s: float = LOST_S


@dataclass(slots=True)
class _Child:
    """One process, and what it said last."""

    name: str
    popen: subprocess.Popen[bytes]
    pumps: list[threading.Thread] = field(default_factory=list)
    last: list[collections.deque[str]] = field(default_factory=list)
    """Of standard output and of standard error."""
    status: int | None = None
    ended_s: float = 0.0

    @property
    def said(self) -> str:
        return "\n".join(self.last[1])

    @property
    def primary(self) -> bool:
        """Whether it failed by itself, and not because another did."""
        return bool(self.status) and self.status != ENDED and _ENDED_BY_JAX not in self.said


def launch(job: Job) -> int:
    """Runs a job to its end; its output comes line by line, each with the number of its process.

    Returns 0, or the exit status of the process that failed first (128 and the signal's number for one that a signal
    ended, or if one ended the launcher), after a message with its last lines. All processes have ended by then.
    """
    # What a signal's handler may put into, while a thread does.
    events: queue.SimpleQueue[_Child | int] = queue.SimpleQueue()
    before = {s: signal.signal(s, lambda number, frame: events.put(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    reader, writer = os.pipe()
    began = time.monotonic()
    children: list[_Child] = []
    try:
        children.extend(_spawn(start, job.command, events, reader) for start in _starts(job, reader))
        os.close(reader)
        return _supervise(children, events, began)
    finally:
        for child in children:
            _signal(child, signal.SIGKILL)
        os.close(writer)
        for number, handler in before.items():
            signal.signal(number, handler)


def _starts(job: Job, pipe: int) -> list[Start]:
    """How the processes of this host start: as said, or as detected, or alone."""
    count = job.processes or 1
    coordinator, total, first = job.coordinator, job.nodes * count, job.node_rank * count
    each = job.devices or (1 if count > 1 else None)
    devices = [None if each is None else list(range(i * each, (i + 1) * each)) for i in range(count)]
    here_only = coordinator is None
    if coordinator is None and count > 1:
        coordinator = f"127.0.0.1:{free_port()}"
    if job.processes is None and coordinator is None and (found := detected(job.detect, job.timeout_s)):
        coordinator, total, first, own = found
        here_only = False
        if job.devices is None:
            devices = [None if own is None else list(own)]
    return [
        Start(
            coordinator=coordinator,
            processes=total,
            process_id=first + index,
            local_devices=None if job.cpu else own_devices,
            cpu_devices=(each or 1) if job.cpu else None,
            loopback=here_only,
            timeout_s=job.timeout_s,
            lost_s=job.lost_s,
            parent_pipe=pipe,
            module=job.module,
        )
        for index, own_devices in enumerate(devices)
    ]


def free_port() -> int:
    """A port of loopback that nothing listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


def _spawn(start: Start, command: Sequence[str], events: queue.SimpleQueue[_Child | int], pipe: int) -> _Child:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if start.loopback:
        environment.setdefault("NCCL_SOCKET_IFNAME", "lo")
    if start.coordinator is not None:
        # gRPC takes an HTTP proxy for every host but these, and then JAX never reaches its coordinator.
        direct = [environment.get("no_grpc_proxy") or environment.get("no_proxy", "")]
        environment["no_grpc_proxy"] = ",".join([*filter(None, direct), split_address(start.coordinator)[0]])
    popen = subprocess.Popen(
        [sys.executable, "-m", "ffjax.distributed.worker", start.to_json(), *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        pass_fds=[pipe],
        start_new_session=True,
    )
    child = _Child(name=str(start.process_id), popen=popen)
    for source, target in ((popen.stdout, sys.stdout.buffer), (popen.stderr, sys.stderr.buffer)):
        assert source is not None
        child.last.append(collections.deque(maxlen=_KEPT))
        child.pumps.append(threading.Thread(target=_pump, args=(child, child.last[-1], source, target), daemon=True))
    for thread in (*child.pumps, threading.Thread(target=_wait, args=(child, events), daemon=True)):
        thread.start()
    return child


def _pump(child: _Child, last: collections.deque[str], source: BinaryIO, target: BinaryIO) -> None:
    prefix = f"[{child.name}] ".encode()
    with source:
        for line in source:
            if _NOISE.search(line) or not line.strip():
                continue
            last.append(line.decode(errors="replace").rstrip())
            target.write(prefix + line.rstrip(b"\n") + b"\n")
            target.flush()


def _wait(child: _Child, events: queue.SimpleQueue[_Child | int]) -> None:
    status = child.popen.wait()
    child.ended_s = time.monotonic()
    _signal(child, signal.SIGKILL)  # what it started
    for pump in child.pumps:
        pump.join(_SETTLE_S)  # what left the session may hold the output open
    child.status = status if status >= 0 else 128 - status
    events.put(child)


def _supervise(children: Sequence[_Child], events: queue.SimpleQueue[_Child | int], began: float) -> int:
    """Until all have ended; the exit status."""
    running = len(children)
    deadline: float | None = None
    told = 0
    while running:
        try:
            event = events.get(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            for child in children:
                _signal(child, signal.SIGKILL)
            deadline = None
            continue
        if isinstance(event, int):
            deadline = time.monotonic() + (0.0 if told else GRACE_S)
            told = told or event
            for child in children:
                _signal(child, signal.Signals(event))
        else:
            running -= 1
            if event.status and running and not told and (deadline is None or event.primary):
                deadline = time.monotonic() + (_SETTLE_S if event.primary else _BLAMING_S)
    if told:
        print(f"ffjax: ended by {signal.Signals(told).name}", file=sys.stderr)
        return 128 + told
    failed = sorted((c for c in children if c.status), key=lambda c: c.ended_s)
    if not failed:
        return 0
    # Those that the launcher ended itself come last.
    first = next((c for c in failed if c.primary), failed[0])
    print(_report(first, len(children), first.ended_s - began), file=sys.stderr)
    assert first.status is not None
    return first.status


def _report(child: _Child, count: int, after_s: float) -> str:
    status = child.status or 0
    how = f"exit status {status}"
    if status > 128:
        how = signal.Signals(status - 128).name
        if status - 128 == signal.SIGKILL:
            how += " (as when memory runs out)"
    others = {1: "", 2: "; the other process on this host was ended"}.get(
        count, f"; the other {count - 1} processes on this host were ended"
    )
    lines = [f"ffjax: process {child.name} ended by {how} after {after_s:.1f} s{others}."]
    last = list(child.last[1] or child.last[0])
    if meaning := _meaning(child.said):
        lines.append(f"What that means: {meaning}")
        # JAX's own log says the same at length.
        last = list(itertools.takewhile(lambda line: not _LOGGED.match(line), last))
    if last:
        lines += ["Its last lines:", *(f"  {line}" for line in last[-_SHOWN:])]
    return "\n".join(lines)


def _meaning(said: str) -> str:
    """What JAX's own messages say, for those who do not know them."""
    if _ENDED_BY_JAX not in said:
        return ""
    if found := _SILENT.search(said):
        lost = found[1].strip()
        return f"process {lost} was lost (killed, or its host is down or cannot be reached); its log says more."
    return "the coordinator (process 0) or its host was lost, or did not answer in time; its log says more."


def _signal(child: _Child, number: signal.Signals) -> None:
    """To a process and all that it started."""
    if child.status is not None:
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):  # just gone
        os.killpg(child.popen.pid, number)
