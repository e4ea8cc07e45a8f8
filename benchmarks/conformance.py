"""The conformance table: every idiom of `tests/conformance` under two plans.

python benchmarks/conformance.py [--jobs N] [--full] [parts of names]
"""

from __future__ import annotations

import argparse
import multiprocessing
import pathlib
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor

from tables import write

from ffjax.testing import fake_devices

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))
from conformance import load
from conformance.harness import IDIOMS, MESHES, STRATEGIES, check

NOTES = (
    "Each idiom is planned by the search on one mesh and runs; it is planned by a named strategy on another, too (and "
    "runs with `--full`; `-` where it did not). `numbers`: three steps (one where there is no state) give the results, "
    "state and metrics of the unsharded step, each within the tolerance of its dtype. `collectives`: kinds, mesh axes "
    "and bytes are those that were planned, one by one; `fewer` where some of them are not left, because the compiler "
    "computes once what the program computes twice. `warned`: what of, if at all.",
)


def rows_of(index: int, name: str, every: bool) -> list[list[str]]:
    """The rows of one idiom; in a process of its own, so that several take turns on several cores."""
    fake_devices(8)
    warnings.simplefilter("ignore")  # of the libraries
    load()
    row, rows = IDIOMS[name], []
    plans = (("auto", MESHES[index % 2], True), (STRATEGIES[1 + index % 3], MESHES[(index + 1) % 2], every))
    for strategy, mesh, run in plans:
        outcome = check(row, strategy, mesh, run=run)
        cells = [outcome.plan, outcome.run, outcome.numerics, outcome.collectives]
        said = [c.split("\n")[0][:80] for c in cells]
        warned = row.warns or ("batch" if outcome.warned else "")
        rows.append([row.group, row.name, f"{strategy}, {'x'.join(map(str, mesh.sizes))}", *said, warned])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="parts of the names of those wanted; all by default")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--full", action="store_true", help="run the plans of named strategies, too")
    wanted = parser.parse_args()
    load()
    names = [n for n in IDIOMS if not wanted.names or any(part in n for part in wanted.names)]
    rows = []
    with ProcessPoolExecutor(wanted.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for found in pool.map(rows_of, range(len(names)), names, [wanted.full] * len(names)):
            rows += found
            for row in found:
                print(*row, flush=True)
    good = sum(all(cell in ("yes", "fewer", "-") for cell in row[3:7]) for row in rows)
    count = f"{good} of {len(rows)} plans of {len(names)} idioms are as they should be."
    if wanted.names:
        print(count)
    else:
        header = ["group", "idiom", "plan", "plans", "runs", "numbers", "collectives", "warned"]
        write("conformance", "Steps as other people write them", (count, *NOTES), header, rows)


if __name__ == "__main__":
    main()
