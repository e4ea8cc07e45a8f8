"""Runs of `ffjax launch` with real processes, for tests: the launcher in this process, or one of its own."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest

from ffjax.cli import main

LIMIT_S = 100
CLI = (sys.executable, "-m", "ffjax.cli", "launch")


class Launch(NamedTuple):
    """What a run leaves."""

    status: int
    output: str
    errors: str


def launched(args: Sequence[str]) -> Launch:
    """What `ffjax launch ARGS` leaves: its processes are real, its launcher is this one, which ends them in time."""
    output, errors = (io.TextIOWrapper(io.BytesIO(), write_through=True) for _ in range(2))
    watchdog = threading.Timer(LIMIT_S, os.kill, (os.getpid(), signal.SIGTERM))
    watchdog.start()
    try:
        with redirect_stdout(output), redirect_stderr(errors), pytest.raises(SystemExit) as end:
            main(["launch", *args])
    finally:
        watchdog.cancel()
    assert isinstance(end.value.code, int)
    return Launch(end.value.code, *(stream.buffer.getvalue().decode() for stream in (output, errors)))


def started(args: Sequence[str], **environment: str) -> subprocess.Popen[str]:
    """A launcher that is a process too: on another host, or to be ended."""
    return subprocess.Popen(
        [*CLI, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit status and output; all that was started has ended by then, or this lasts."""
    output, _ = process.communicate(timeout=LIMIT_S)
    return process.returncode, output


def script(folder: Path, text: str) -> str:
    """A file that runs this after the usual imports."""
    path = folder / "script.py"
    path.write_text("import os, subprocess, sys, time, jax\n" + textwrap.dedent(text))
    return str(path)
