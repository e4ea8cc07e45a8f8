"""`ffjax launch` on the command line."""

from __future__ import annotations

import click

from ffjax.distributed import LOST_S, START_S
from ffjax.distributed.launch import Job, launch


@click.command(
    "launch",
    short_help="Runs a script in several processes.",
    context_settings={"allow_interspersed_args": False},  # the script's own options
)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="SCRIPT.py [ARGS]...")
@click.option("-m", "--module", is_flag=True, help="SCRIPT is a module's name, as in python -m.")
@click.option("--processes", type=click.IntRange(min=1), help="On this host; by default one.")
@click.option(
    "--devices-per-process",
    "devices",
    type=click.IntRange(min=1),
    help="Accelerators of each process; by default all, or one each where there are several processes.",
)
@click.option("--cpu", is_flag=True, help="Fake CPU devices in place of accelerators.")
@click.option("--coordinator", metavar="HOST:PORT", help="Where process 0 listens, for a run on several hosts.")
@click.option("--nnodes", "nodes", default=1, show_default=True, type=click.IntRange(min=1), help="Hosts of the run.")
@click.option("--node-rank", default=0, show_default=True, type=click.IntRange(min=0), help="Which this is.")
@click.option("--detect", metavar="METHOD", help="How JAX detects the run, such as mpi4py; by default any way.")
@click.option(
    "--timeout",
    "timeout_s",
    default=START_S,
    show_default=True,
    type=click.FloatRange(min=1),
    help="Seconds that processes wait for each other: to start, and to come to the same plan.",
)
@click.option(
    "--lost-after",
    "lost_s",
    default=LOST_S,
    show_default=True,
    type=click.FloatRange(min=1),
    help="Seconds without a sign of a process after which the others end.",
)
@click.pass_context
def launch_command(
    ctx: click.Context,
    command: tuple[str, ...],
    module: bool,
    processes: int | None,
    devices: int | None,
    cpu: bool,
    coordinator: str | None,
    nodes: int,
    node_rank: int,
    detect: str | None,
    timeout_s: float,
    lost_s: float,
) -> None:
    """Runs a script in several processes that are one JAX program; when one fails, all end.

    With --processes on this host, where they listen on loopback only; with --coordinator and --nnodes on several, on
    each of which it is called; without either, as one process of the run that SLURM, MPI or Kubernetes started, if JAX
    detects one. Options come before the script. The script needs no line for it: what `jax.distributed.initialize` does
    is done when it starts.

    \b
    ffjax launch --processes 2 --devices-per-process 2 --cpu train.py --steps 10
    ffjax launch --nnodes 4 --node-rank 0 --coordinator node-0:29400 train.py     # on each host, with its rank
    srun ffjax launch train.py
    """
    if detect is not None and (coordinator or nodes > 1 or node_rank or processes):
        raise click.UsageError("--detect asks JAX for what --coordinator, --nnodes, --node-rank and --processes say")
    if nodes > 1 and coordinator is None:
        raise click.UsageError("--nnodes needs --coordinator HOST:PORT, an address of host 0, the same on every host")
    if node_rank >= nodes:
        raise click.UsageError(f"--node-rank {node_rank} of --nnodes {nodes}: ranks count from 0")
    job = Job(
        command=command,
        module=module,
        processes=processes,
        devices=devices,
        cpu=cpu,
        coordinator=coordinator,
        nodes=nodes,
        node_rank=node_rank,
        detect=detect,
        timeout_s=timeout_s,
        lost_s=lost_s,
    )
    ctx.exit(launch(job))
