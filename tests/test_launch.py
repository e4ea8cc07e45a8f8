"""`ffjax launch`, with real processes: they are one program, train to the same losses, and end together."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from click.testing import CliRunner

from ffjax.cli import main
from ffjax.cli.launching import launch_command
from ffjax.distributed import ENDED, detected
from ffjax.distributed import launch as launching
from ffjax.distributed.launch import Job
from ffjax.examples.launch import train

sys.path.insert(0, str(Path(__file__).parent))
from launched import Launch, ended, launched, script, started

TRAIN = train.__file__


def line_of(process: subprocess.Popen[str], pattern: str) -> re.Match[str]:
    """The first line of the output that matches."""
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.search(pattern, line):
            return found
    raise AssertionError(f"ended without {pattern!r}")


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ---- training


def test_four_processes_train_to_the_losses_of_one(tmp_path: Path) -> None:
    """Two do in tests/test_two_processes.py."""
    cluster = ["--processes", "4", "--devices-per-process", "2", "--cpu"]
    run = launched([*cluster, TRAIN, "--steps", "4", "--strategy", "fsdp", "--cache", str(tmp_path / "plans")])
    assert run.status == 0, run.errors
    assert not run.errors  # no noise
    step, state, losses = jax.jit(train.train_step), train.init(jax.random.key(0)), []
    for i in range(4):
        state, loss = step(state, train.rows(i, np.arange(64)))
        losses.append(float(loss))
    np.testing.assert_allclose([float(loss) for loss in re.findall(r"loss ([\d.]+)", run.output)], losses, rtol=1e-5)
    assert run.output.startswith("[0] 4 processes, 8 devices")
    assert all(line.startswith("[0]") for line in run.output.splitlines()), run.output
    (plan,) = (tmp_path / "plans").iterdir()
    assert plan.suffix == ".json"


# ---- processes


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """A run of two processes that look around, until one of them fails."""
    text = """
        import numpy as np
        jax.distributed.initialize()  # done already
        ones = jax.make_array_from_callback((2,), jax.sharding.NamedSharding(
            jax.make_mesh((2,), ("x",)), jax.P("x")), lambda index: np.array([jax.process_index() + 1.0]))
        print("sum", float(jax.jit(lambda x: x.sum())(ones)), sys.argv[1:], __name__)
        inodes = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if
                  os.path.islink(f"/proc/self/fd/{fd}")]
        for table in ("/proc/net/tcp", "/proc/net/tcp6"):
            for row in map(str.split, open(table).readlines()[1:]):
                if row[3] == "0A" and f"socket:[{row[9]}]" in inodes:
                    print("listens", row[1].partition(":")[0])
        child = subprocess.Popen(["sleep", "1000"])
        print("pids", os.getpid(), child.pid, flush=True)
        def look(x):
            raise ValueError("the data is damaged")
        try:
            if jax.process_index() == 1:
                time.sleep(0.5)
                jax.block_until_ready(jax.jit(lambda x: jax.pure_callback(look, x, x))(1.0))
        except Exception:
            pass  # as if it were stuck in a collective of the step
        time.sleep(1000)
    """
    path = script(tmp_path_factory.mktemp("failed"), text)
    with pytest.MonkeyPatch.context() as patch:
        # A proxy that is for other hosts only.
        patch.setenv("http_proxy", "http://127.0.0.1:9")
        patch.setenv("no_proxy", "")
        return launched(["--processes", "2", "--cpu", path, "--lr", "0.1"])


def test_a_script_runs_as_it_does_alone(failed: Launch) -> None:
    assert sorted(re.findall(r"\[(\d)\] sum 3.0 \['--lr', '0.1'\] __main__", failed.output)) == ["0", "1"]


def test_processes_listen_on_loopback_only(failed: Launch) -> None:
    listening = set(re.findall(r"listens (\w+)", failed.output))
    assert listening
    # 127.0.0.1, and the same written as an IPv6 address.
    assert listening <= {"0100007F", "0000000000000000FFFF00000100007F"}


def test_when_a_callback_fails_all_end_though_the_step_is_stuck(failed: Launch) -> None:
    """An exception of the script itself is in tests/test_two_processes.py."""
    assert failed.status == 1
    assert re.search(r"\nffjax: process 1 ended by exit status 1 after [\d.]+ s; the other process", failed.errors)
    assert "  ValueError: the data is damaged\n" in failed.errors.split("Its last lines:")[1]
    assert failed.errors.endswith("  ffjax: process 1 ends because a callback raised ValueError\n")
    assert re.search(
        r"\[0\] ffjax: process 0 ends because process 1 \(.*\) failed: ValueError: the data", failed.errors
    )
    pids = [int(pid) for found in re.findall(r"pids (\d+) (\d+)", failed.output) for pid in found]
    assert len(pids) == 4
    assert not any(map(is_alive, pids))


def test_a_failure_on_another_host_is_heard_of(tmp_path: Path) -> None:
    path = script(tmp_path, "if jax.process_index() == 1: sys.exit(5)\ntime.sleep(1000)")
    hosts = ["--cpu", "--timeout", "30", "--nnodes", "2", "--coordinator", f"127.0.0.1:{launching.free_port()}"]
    other = started([*hosts, "--node-rank", "1", path])
    first = launched([*hosts, "--node-rank", "0", path])
    second, said = ended(other)
    assert (first.status, second) == (ENDED, 5)
    assert re.search(r"process 0 ends because process 1 \(on .*\) failed: it exits with 5", first.errors)
    assert "process 1 ended by exit status 5" in said


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_no_process_is_left_when_the_launcher_is_told_to_end(number: int, status: int, tmp_path: Path) -> None:
    text = """
        child = subprocess.Popen(["sleep", "1000"])
        print("pids", os.getpid(), child.pid, flush=True)
        time.sleep(1000)
    """
    launcher = started(["--processes", "1", "--cpu", script(tmp_path, text)])
    pids = [int(pid) for pid in line_of(launcher, r"pids (\d+) (\d+)").groups()]
    launcher.send_signal(number)
    assert ended(launcher)[0] == status
    until = time.monotonic() + 10
    while any(map(is_alive, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(is_alive, pids))


def test_processes_that_slurm_started_are_one_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = script(tmp_path, "print('of', jax.process_count(), 'on', jax.device_count(), 'devices')")
    slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    command = ["--cpu", "--timeout", "30", path]
    other = started(command, SLURM_PROCID="1", SLURM_LOCALID="1")
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_LOCALID", "0")
    assert launched(command) == (0, "[0] of 2 on 2 devices\n", "")
    assert ended(other) == (0, "[1] of 2 on 2 devices\n")


# ---- what is started, without starting it


def test_what_mpi_says_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    assert detected() is None
    monkeypatch.setenv("OMPI_MCA_orte_hnp_uri", "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "3")
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "1")
    found = detected()
    assert found is not None
    assert found[0].startswith("10.96.0.1:")
    assert (found[1], found[2], list(found[3] or ())) == (4, 3, [1])


def test_ids_and_devices_on_several_hosts() -> None:
    job = Job(command=["train.py"], processes=4, devices=2, coordinator="node-0:29400", nodes=3, node_rank=2)
    starts = launching._starts(job, 0)
    assert [(s.process_id, s.processes, s.local_devices) for s in starts] == [
        (8, 12, [0, 1]),
        (9, 12, [2, 3]),
        (10, 12, [4, 5]),
        (11, 12, [6, 7]),
    ]
    assert not any(s.loopback for s in starts)


def test_one_process_on_each_host_has_all_its_devices() -> None:
    (start,) = launching._starts(Job(command=["train.py"], coordinator="node-0:29400", nodes=2, node_rank=1), 0)
    assert (start.process_id, start.processes, start.local_devices) == (1, 2, None)


def test_alone_there_is_no_coordinator() -> None:
    (start,) = launching._starts(Job(command=["train.py"], processes=1), 0)
    assert (start.coordinator, start.processes) == (None, 1)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--nnodes", "2", "train.py"], "--nnodes needs --coordinator HOST:PORT"),
        (["--nnodes", "2", "--node-rank", "2", "--coordinator", "a:1", "train.py"], "ranks count from 0"),
        (["--detect", "mpi4py", "--processes", "2", "train.py"], "--detect asks JAX for what"),
        (["--processes", "0", "train.py"], "0 is not in the range"),
        (["--process", "2", "--cpus", "train.py"], "No such option"),
        ([], "Missing argument"),
    ],
)
def test_options_that_do_not_go_together(args: list[str], message: str) -> None:
    result = CliRunner().invoke(main, ["launch", *args])
    assert result.exit_code == 2
    assert message in result.output


def test_example_scripts_give_options_that_there_are() -> None:
    folder = Path(TRAIN).parent
    (slurm,) = re.findall(r"\nsrun ffjax launch (.*)", folder.joinpath("slurm.sbatch").read_text())
    job = folder.joinpath("kubernetes.yaml").read_text().replace("$(JOB_COMPLETION_INDEX)", "1")
    pods = re.findall(r"- (--\S+|examples\S+)", job)
    for args in (slurm.split(), pods):
        context = launch_command.make_context("launch", list(args))
        assert context.params["command"][0] == "examples/launch/train.py"
        assert context.params["timeout_s"] == 600


@pytest.mark.parametrize(
    ("said", "means"),
    [
        ("detected fatal errors ... stopped sending heartbeats):\n3\nThe tasks have crashed", "process 3 was lost"),
        ("detected fatal errors ... UNAVAILABLE: Failed to send RPC", r"the coordinator \(process 0\)"),
        ("ValueError: nothing of JAX's", "^$"),
    ],
)
def test_what_jax_says_is_explained(said: str, means: str) -> None:
    assert re.search(means, launching._meaning(said.replace("detected", "JAX distributed service detected")))
