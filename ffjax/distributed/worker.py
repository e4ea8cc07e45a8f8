"""What `ffjax launch` runs in each process: joins the others, then runs the user's script as Python would.

python -m ffjax.distributed.worker START.json-text script.py args...
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import runpy
import signal
import sys
import threading
from dataclasses import dataclass

import jax

from ffjax import distributed
from ffjax.errors import FfjaxError
from ffjax.ir import compat


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """How one process starts."""

    coordinator: str | None
    """None for a process alone."""
    processes: int
    process_id: int
    local_devices: list[int] | None
    cpu_devices: int | None
    """Fake CPU devices in place of accelerators; None for those that there are."""
    loopback: bool
    """Whether all processes are on this host, so that none listens to others."""
    timeout_s: float
    lost_s: float
    parent_pipe: int
    """A file that ends when the launcher does."""
    module: bool
    """Whether the script is a module's name."""

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))


def main() -> None:
    start = Start(**json.loads(sys.argv[1]))
    sys.argv = sys.argv[2:]
    threading.Thread(target=_end_with_parent, args=(start.parent_pipe,), daemon=True).start()
    if start.cpu_devices is not None:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", start.cpu_devices)
    if start.loopback and start.processes > 1:
        compat.cpu_collectives_over("127.0.0.1")
    try:
        if start.coordinator is not None:
            with contextlib.suppress(AttributeError):  # a JAX that has no such option
                jax.config.update("jax_check_proxy_envs", False)  # the launcher sees to proxies
            distributed.initialize(
                start.coordinator,
                start.processes,
                start.process_id,
                local_devices=start.local_devices,
                timeout_s=start.timeout_s,
                lost_s=start.lost_s,
            )
    except FfjaxError as error:
        sys.exit(f"ffjax: {error}")
    # A script's own call finds all done.
    jax.distributed.initialize = lambda *args, **kwargs: None
    _run(sys.argv[0], start.module)


def _run(script: str, module: bool) -> None:
    """Runs the script as `__main__`; a failure is told to the other processes before this one ends."""
    sys.path[0] = os.getcwd() if module else os.path.dirname(os.path.abspath(script))
    try:
        if module:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(script, run_name="__main__")
    except SystemExit as ended:
        if ended.code not in (None, 0):
            distributed.fail(f"it exits with {ended.code!r}", ended.code if isinstance(ended.code, int) else 1)
        raise
    except BaseException as error:
        # Its author knows the script's own frames, not ours or those of runpy.
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename.startswith((__file__, "<frozen")):
            trace = trace.tb_next
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        sys.exit(1)


def _end_with_parent(pipe: int) -> None:
    """Ends this process and its own children when the launcher is gone, however it ended."""
    while os.read(pipe, 1):
        pass
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    main()
