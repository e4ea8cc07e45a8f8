"""Injects each fault of a run of several processes, and says what its user sees and after how long.

    python benchmarks/faults.py [--out benchmarks/results/multi_process.md] [--only NAME]

Real processes of fake CPU devices on this machine. A host is a launcher of its own, so several stand for several hosts.
"""

import argparse
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from ffjax.distributed.launch import free_port

ROOT = Path(__file__).parents[1]
FAULTY, TRAIN = str(ROOT / "benchmarks" / "faulty.py"), str(ROOT / "examples" / "launch" / "train.py")
LIMIT_S = 90.0
"""A case that lasts longer hangs."""


@dataclass(kw_only=True)
class Case:
    """A fault: how each host is launched, and what happens once a line is seen."""

    name: str
    what: str
    limit: str
    """The time limit that holds, as the user gives it."""
    hosts: list[list[str]]
    environment: dict[int, dict[str, str]] = field(default_factory=dict)
    """What a host has besides."""
    at: str = ""
    """The fault comes when the first host's output has this; from the start if empty."""
    signals: dict[int, int] = field(default_factory=dict)
    """What is sent then: to the launcher of a host."""
    lost: int | None = None
    """The host whose processes and launcher are killed then, as if its power failed."""
    suspended: int | None = None
    """The host whose processes are suspended then."""

    @property
    def silent(self) -> int | None:
        """The host that nobody hears of again."""
        return self.suspended if self.lost is None else self.lost


class Host:
    """A launcher, with its output as it comes."""

    def __init__(self, args: list[str], environment: dict[str, str]) -> None:
        self.lines: list[str] = []
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "ffjax.cli", "launch", *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1", **environment},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.ended_s = 0.0

    def _read(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self.lines.append(line.rstrip("\n"))

    def wait(self, timeout_s: float) -> None:
        self.popen.wait(max(0.1, timeout_s))
        self._reader.join(5)
        self.ended_s = self.ended_s or time.monotonic()

    def processes(self) -> list[int]:
        """The processes that the launcher started."""
        return [int(p) for p in Path(f"/proc/{self.popen.pid}/task/{self.popen.pid}/children").read_text().split()]


def hosts(fault: str, *options: list[str], count: int = 2, port: int | None = None) -> list[list[str]]:
    """One process on each host, unless its options say otherwise; process 0 listens on the port."""
    port = port or free_port()
    common = ["--cpu", "--timeout", "10", "--lost-after", "10", "--nnodes", str(count)]
    return [
        [*common, "--coordinator", f"127.0.0.1:{port}", "--node-rank", str(rank), *own, FAULTY, fault]
        for rank, own in enumerate(options)
    ]


def cases(folder: Path) -> list[Case]:
    """All of them; ports are free ones."""

    def local(fault: str, *more: str) -> list[list[str]]:
        return [["--processes", "2", "--devices-per-process", "2", "--cpu", "--timeout", "10", FAULTY, fault, *more]]

    package = folder / "packages" / "jaxlib-0.9.0.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: jaxlib\nVersion: 0.9.0\n")
    taken = free_port()
    alone = hosts("none", [])
    return [
        Case(
            name="exception", what="an exception in one process", limit="at once", hosts=local("exception"), at="step 3"
        ),
        Case(
            name="callback",
            what="an exception in the middle of a step (in a callback), the others in a collective",
            limit="at once",
            hosts=local("callback"),
            at="step 3",
        ),
        Case(name="exit", what="one process exits with 5", limit="at once", hosts=local("exit"), at="step 3"),
        Case(name="killed", what="one process is killed", limit="at once", hosts=local("killed"), at="step 3"),
        Case(
            name="exception elsewhere",
            what="an exception on another host",
            limit="at once",
            hosts=hosts("exception", [], []),
            at="step 3",
        ),
        Case(
            name="host lost",
            what="another host loses power",
            limit="--lost-after 10",
            hosts=hosts("none", [], []),
            at="step 3",
            lost=1,
        ),
        Case(
            name="host stops",
            what="another host stops answering (its process is suspended)",
            limit="--lost-after 10",
            hosts=hosts("none", [], []),
            at="step 3",
            suspended=1,
        ),
        Case(
            name="coordinator lost",
            what="the host of process 0 loses power",
            limit="at once",
            hosts=hosts("none", [], []),
            at="step 3",
            lost=0,
        ),
        Case(name="too few", what="one of two hosts is not started", limit="--timeout 10", hosts=alone),
        Case(
            name="no coordinator",
            what="nobody answers at the coordinator's address",
            limit="--timeout 10",
            hosts=hosts("none", [], [])[1:],
        ),
        Case(
            name="wrong count",
            what="the hosts are told different numbers of processes",
            limit="at once",
            hosts=hosts("none", [], ["--nnodes", "3"]),
        ),
        Case(
            name="same rank",
            what="two hosts have the same rank",
            limit="at once",
            hosts=hosts("none", [], [], ["--node-rank", "1"], count=3),
        ),
        Case(
            name="port in use",
            what="the coordinator's port is in use",
            limit="at once, the others --timeout 10",
            hosts=hosts("none", [], [], port=taken),
            environment={0: {"FFJAX_FAULTS_PORT": str(taken)}},
        ),
        Case(
            name="versions",
            what="another version of a package on one host",
            limit="at once",
            hosts=hosts("none", [], []),
            environment={1: {"PYTHONPATH": str(package.parent)}},
        ),
        Case(name="code", what="other code in one process", limit="at once", hosts=local("code")),
        Case(name="shapes", what="a batch of another size in one process", limit="at once", hosts=local("shapes")),
        Case(name="options", what="another strategy in one process", limit="at once", hosts=local("options")),
        Case(name="order", what="one process does not come to the plan", limit="--timeout 10", hosts=local("order")),
        Case(
            name="order 0",
            what="process 0 does not come to the plan",
            limit="--timeout 10",
            hosts=local("order", "0"),
        ),
        Case(name="memory", what="no plan fits", limit="at once", hosts=local("memory")),
        Case(name="search", what="the search raises in process 0", limit="at once", hosts=local("search")),
        Case(name="Ctrl-C", what="Ctrl-C", limit="10 s", hosts=local("none"), at="step 3", signals={0: signal.SIGINT}),
        Case(
            name="SIGTERM", what="SIGTERM", limit="10 s", hosts=local("none"), at="step 3", signals={0: signal.SIGTERM}
        ),
        Case(
            name="launcher killed",
            what="the launcher is killed",
            limit="at once",
            hosts=local("none"),
            at="step 3",
            signals={0: signal.SIGKILL},
        ),
    ]


def run(case: Case) -> tuple[float, list[str]]:
    """Seconds from the fault to the end of everything, and for each host what its user sees last."""
    port = case.environment.get(0, {}).get("FFJAX_FAULTS_PORT")
    with contextlib.ExitStack() as stack:
        if port:
            stack.enter_context(socket.create_server(("127.0.0.1", int(port))))
        began = time.monotonic()
        hosts = [Host(args, case.environment.get(i, {})) for i, args in enumerate(case.hosts)]
        try:
            if case.at:
                began = _seen(hosts[0], case.at)
            processes = [p for host in hosts for p in host.processes()] if case.at else []
            for index, number in case.signals.items():
                hosts[index].popen.send_signal(number)
            if case.silent is not None:
                silent = hosts[case.silent]
                for process in (*silent.processes(), silent.popen.pid):
                    os.kill(process, signal.SIGSTOP if case.lost is None else signal.SIGKILL)
                processes = []
            for index, host in enumerate(hosts):
                if index != case.silent:
                    host.wait(began + LIMIT_S - time.monotonic())
            while any(map(_alive, processes)):
                if time.monotonic() > began + LIMIT_S:
                    raise TimeoutError(f"processes are left: {processes}")
                time.sleep(0.01)
            seconds = time.monotonic() - began
        finally:
            for host in hosts:
                for process in host.processes() if host.popen.poll() is None else ():
                    os.kill(process, signal.SIGKILL)
                host.popen.kill()
    seen = []
    for index, host in enumerate(hosts):
        if index != case.silent:
            start = next((i for i, line in enumerate(host.lines) if line.startswith("ffjax: ")), 0)
            seen.append("\n".join([f"exit status {host.popen.returncode}", *host.lines[start:]]))
    return seconds, seen


def _seen(host: Host, text: str) -> float:
    """When a host's output has a text, as the clock says."""
    deadline = time.monotonic() + LIMIT_S
    while not any(text in line for line in host.lines):
        if time.monotonic() > deadline or host.popen.poll() is not None:
            raise TimeoutError("\n".join(host.lines))
        time.sleep(0.01)
    return time.monotonic()


def _alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def training() -> list[tuple[str, str]]:
    """The example in one process, in two and in four: command and output."""
    runs = []
    for options in ([], ["--processes", "2"], ["--processes", "4"]):
        args = [*options, "--devices-per-process", "2", "--cpu"]
        host = Host([*args, TRAIN, "--steps", "10"], {})
        host.wait(LIMIT_S)
        shown = f"ffjax launch {' '.join(args)} examples/launch/train.py --steps 10"
        runs.append((shown, "\n".join(host.lines)))
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="where to write the results, as Markdown")
    parser.add_argument("--only", action="append", help="a case, by its name; several if given again")
    args = parser.parse_args()
    rows, details = [], []
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(Path(folder)):
            if args.only is None or case.name in args.only:
                seconds, seen = run(case)
                print(f"{case.name}: {seconds:.1f} s", *seen, sep="\n", flush=True)
                rows.append(f"| {case.what} | {case.limit} | {seconds:.1f} | {_gist(seen)} |")
                details.append(f"### {case.name}: {case.what}\n\n```text\n" + "\n\n".join(seen) + "\n```\n")
    if args.out:
        began = time.monotonic()
        healthy = [Host(host, {}) for host in hosts("none", [], [])]
        first = _seen(healthy[0], "step 1 ") - began
        for host in healthy:
            host.popen.terminate()
            host.wait(LIMIT_S)
        logs = [f"```text\n$ {command}\n{output}\n```\n" for command, output in training()]
        text = "\n".join(
            [
                "# Runs of several processes",
                "",
                "Made by `python benchmarks/faults.py`: real processes of fake CPU devices on one machine; each",
                "launcher stands for a host. Seconds count from the fault, or, for faults of the start, from the",
                "launch, to the end of the last process. Without a fault, the first step of two hosts came",
                f"{first:.1f} s after the launch.",
                "",
                "| fault | limit | seconds | what the user sees |",
                "| --- | --- | --- | --- |",
                *rows,
                "",
                "## Training in one, two and four processes",
                "",
                *logs,
                "## What is seen last, in full",
                "",
                "For each host the exit status of its launcher, and what it prints last.",
                "",
                *details,
            ]
        )
        text = re.sub(r'"/[^"]*/site-packages/', '"', text.replace(f"{ROOT}/", ""))
        Path(args.out).write_text(text, encoding="utf-8")


_TELLING = (
    "What that means",
    r"(Distributed|Budget)Error: ",
    "ends because",
    "  ffjax: ",
    r"\w+Error: ",
    "^ffjax: ",
)
"""The line that says it, best first."""


def _gist(seen: list[str]) -> str:
    lines = [line for text in seen for line in text.splitlines()]
    found = next((line for kind in _TELLING for line in lines if re.search(kind, line)), "nothing: it is gone")
    return found.strip().replace("|", "\\|")


if __name__ == "__main__":
    main()
