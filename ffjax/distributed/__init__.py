"""Runs of many processes: they start together or say why not, and when one fails the others end too.

`initialize` does what `jax.distributed.initialize` does, with errors in place of hangs. `ffjax launch` calls it for the
script that it runs; a script that SLURM, MPI or Kubernetes starts by themselves calls it before anything of JAX.
"""

from __future__ import annotations

import atexit
import importlib.metadata
import os
import platform
import re
import socket
import sys
import threading
import time
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax

from ffjax.distributed.key_value import KeyValueStore
from ffjax.distributed.rendezvous import LOOPBACK, Member, meet, split_address
from ffjax.errors import DistributedError
from ffjax.ir import compat

START_S = 300.0
"""How long processes wait for each other, by default: to start, and to come to the same plan."""
LOST_S = 60.0
"""How long a process may be silent before the others end, by default."""
ENDED = 78
"""Exit status of a process that ends because another failed."""

_SAME = ("ffjax", "jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu")
"""Packages that have to be the same in all processes, where they are installed."""
_GRACE_S = 2.0
"""What another's failure leaves a process, to say what it has to say itself."""
_LISTEN_S = 600.0
_BROKEN = re.compile(r"\b(Gloo|NCCL|nccl\w+)\b")
"""In what JAX raises where a collective does not come to its end."""


@dataclass(slots=True)
class _Run:
    """What `initialize` started in this process."""

    store: KeyValueStore
    process_id: int
    processes: int
    timeout_s: float
    lost_s: float
    status: int = 0
    """What this process exits with because it failed."""


_runs: list[_Run] = []
"""None, or the one of this process: JAX's distributed system is one as well."""


def initialize(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    *,
    local_devices: Sequence[int] | None = None,
    detect: str | None = None,
    timeout_s: float = START_S,
    lost_s: float = LOST_S,
) -> bool:
    """Joins the processes of a run, before JAX makes any device; False where there is but this one.

    Without arguments it takes what `jax.distributed` detects (SLURM, Open MPI, Kubernetes, TPU pods); where that is
    nothing, or all is initialized already, it does nothing. All processes wait until everybody is there and alike, then
    a failure of one (an exception that nobody catches) ends the others, with its message and exit status 78.

    Args:
      coordinator: `host:port` of process 0, where it listens: on loopback only if that is the host.
      processes, process_id: how many there are, and which this is, from 0.
      local_devices: the accelerators of this process, by default all; where detected, as JAX has it: one for each
        process under SLURM and MPI (`JAX_LOCAL_DEVICE_IDS=0,1,2,3` gives one process four).
      detect: `cluster_detection_method` of `jax.distributed.initialize`, such as `"mpi4py"`.
      timeout_s: how long processes wait for each other, to start and to come to the same plan.
      lost_s: how long one may be silent (killed, its host down) before the others end.

    Raises:
      DistributedError: the same in all processes: some did not come in time, or differ in the number of processes or in
        versions; also for a port in use, and for a coordinator that does not answer.

    >>> initialize()
    False
    """
    if jax.distributed.is_initialized():
        return True
    if coordinator is None:
        found = detected(detect, timeout_s)
        if found is None:
            return False
        coordinator, processes, process_id, devices = found
        local_devices = devices if local_devices is None else local_devices
    if processes is None or process_id is None:
        raise DistributedError(
            f"coordinator={coordinator!r} with processes={processes} and process_id={process_id}. Remedy: give all "
            "three."
        )
    me = Member(process_id=process_id, processes=processes, host=socket.gethostname(), versions=versions())
    left_s = deadline(timeout_s)
    meet(coordinator, me, timeout_s=timeout_s)
    jax.distributed.initialize(
        coordinator,
        processes,
        process_id,
        local_device_ids=local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=max(10, round(left_s())),
        heartbeat_timeout_seconds=max(1, round(lost_s)),
        shutdown_timeout_seconds=max(1, round(timeout_s)),
        coordinator_bind_address=coordinator if split_address(coordinator)[0] in LOOPBACK else None,
    )
    _watch(process_id, processes, timeout_s, lost_s)
    return True


def store() -> KeyValueStore | None:
    """The key-value store of this run, whoever initialized it; None where there is but one process."""
    client = compat.key_value_client()
    return None if client is None or jax.process_count() == 1 else KeyValueStore(client)


def timeout_s() -> float:
    """How long the processes of this run wait for each other."""
    return _runs[0].timeout_s if _runs else START_S


def versions() -> dict[str, str]:
    """What has to be the same in all processes; `"not"` for what is not installed."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in _SAME:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not"
    return found


def deadline(limit_s: float) -> Callable[[], float]:
    """A clock that runs down: the seconds left of the limit, less than 0 once it has passed."""
    end = time.monotonic() + limit_s
    return lambda: end - time.monotonic()


def fail(why: str, status: int = 1) -> None:
    """Has all other processes end, saying that this one failed; a no-op in a run of one process.

    This process is to end then, with `status`: it does so without JAX's own exit, which would wait for the others.
    """
    if not _runs:
        return
    run = _runs[0]
    run.status = status
    text = f"process {run.process_id} (on {socket.gethostname()}) failed: {why}"
    try:
        for other in range(run.processes):
            if other != run.process_id:
                run.store.put(_ended(other), text)
    except jax.errors.JaxRuntimeError:
        pass  # the coordinator is gone, which JAX tells the others


def detected(
    method: str | None = None, timeout_s: float = START_S
) -> tuple[str, int, int, Sequence[int] | None] | None:
    """Coordinator, number of processes, this one's id and its accelerators, as SLURM, MPI or Kubernetes have it.

    None where JAX detects no such run, or this is its only process. Raises DistributedError where it cannot tell.
    """
    try:
        coordinator, processes, process_id, local_devices = compat.detected_processes(method, timeout_s)
    except Exception as error:  # what JAX's detection meets: sockets, Kubernetes' API, MPI
        raise DistributedError(
            f"JAX could not tell which process of which run this is: {error}. Remedy: mend that, or say it: "
            "coordinator, processes and process_id (ffjax launch --coordinator HOST:PORT --nnodes N --node-rank K, or "
            "--processes 1 for this one alone)."
        ) from error
    if coordinator is None or processes is None or process_id is None or processes == 1:
        return None
    return coordinator, processes, process_id, local_devices


# -- when one fails


def _ended(process_id: int) -> str:
    return f"ffjax/ended/{process_id}"


def _watch(process_id: int, processes: int, timeout_s: float, lost_s: float) -> None:
    """Ends this process when another fails, and tells the others when this one does."""
    client = compat.key_value_client()
    assert client is not None
    store = KeyValueStore(client)
    run = _Run(store, process_id, processes, timeout_s, lost_s)
    _runs.append(run)
    listener = threading.Thread(target=_listen, args=(store, process_id), daemon=True)
    listener.start()

    def goodbye() -> None:
        """After the script's own handlers, before JAX's: ends the thread before the client that it asks."""
        if run.status:
            if process_id == 0:  # the coordinator goes with it: the others shall end by themselves first
                time.sleep(1.2 * _GRACE_S)
            _exit_now(run.status)
        try:
            store.put(_ended(process_id), "")
        except jax.errors.JaxRuntimeError:
            return
        listener.join(_GRACE_S)

    atexit.register(goodbye)
    before = sys.excepthook

    def uncaught(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
        before(kind, error, trace)
        if _BROKEN.search(str(error)):
            _await_cause(run)
        fail(f"{kind.__name__}: {error}")

    sys.excepthook = uncaught
    compat.when_a_callback_fails(lambda error: _callback_failed(run, error))


def _callback_failed(run: _Run, error: BaseException) -> None:
    """In the thread of a callback that raises: tells the others, which wait in the step's next collective.

    So may this process's own main thread, which otherwise ends it by the error.
    """
    if run.status:
        return
    fail(f"{type(error).__name__}: {error}")

    def end() -> None:
        # Before the others are, by whose end it would be ended; but the coordinator goes last.
        time.sleep(_GRACE_S * (1.5 if run.process_id == 0 else 0.5))
        print(f"ffjax: process {run.process_id} ends because a callback raised {type(error).__name__}", file=sys.stderr)
        _exit_now(run.status)

    threading.Thread(target=end, daemon=True).start()


def _await_cause(run: _Run) -> None:
    """After a collective that broke: until it is known why, when the listener, JAX or the launcher ends us."""
    print(
        f"ffjax: process {run.process_id} could not communicate, as when another process was lost; waits up to "
        f"{run.lost_s:g} s to hear which",
        file=sys.stderr,
        flush=True,
    )
    time.sleep(run.lost_s + _GRACE_S)


def _listen(store: KeyValueStore, process_id: int) -> None:
    text: str | None = None
    while text is None:
        try:
            text = store.get(_ended(process_id), _LISTEN_S, slice_s=_LISTEN_S)
        except jax.errors.JaxRuntimeError:
            return  # the coordinator is gone: JAX ends this process
    if text:
        time.sleep(_GRACE_S)
        print(f"ffjax: process {process_id} ends because {text}", file=sys.stderr)
        _exit_now(ENDED)


def _exit_now(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
