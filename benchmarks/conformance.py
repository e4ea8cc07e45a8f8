"""The conformance table: every idiom of `tests/conformance` under two plans.

python benchmarks/conformance.py [part of a name]
"""

from __future__ import annotations

import importlib
import pathlib
import sys
import warnings
from collections import Counter

from tables import write

from ffjax.testing import fake_devices

NOTES = (
    "Each idiom is planned by the search on one mesh and by a named strategy on another. `numbers`: three steps (one "
    "where there is no state) give the results, state and metrics of the unsharded step, each within the tolerance of "
    "its dtype. `collectives`: kinds, mesh axes and bytes are those that were planned; `fewer` where the compiler "
    "computes once what the program computes twice, or makes one of two all-to-alls in a row. `warned`: what of, if at "
    "all.",
)


def main() -> None:
    fake_devices(8)
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))
    from conformance import MODULES
    from conformance.harness import IDIOMS, MESHES, STRATEGIES, check

    warnings.simplefilter("ignore")  # of the libraries
    for module in MODULES:
        importlib.import_module(f"conformance.{module}")
    rows, totals = [], Counter[str]()
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    for i, row in enumerate(r for r in IDIOMS.values() if wanted in r.name):
        plans = (("auto", MESHES[i % 2]), (STRATEGIES[1 + i % 3], MESHES[(i + 1) % 2]))
        for strategy, mesh in plans:
            outcome = check(row, strategy, mesh)
            cells = [outcome.plan, outcome.run, outcome.numerics, outcome.collectives]
            totals.update(plans=1, green=not outcome.failures)
            said = [c.split("\n")[0][:80] for c in cells]
            warned = row.warns or ("batch" if outcome.warned else "")
            rows.append([row.group, row.name, f"{strategy}, {'x'.join(map(str, mesh.sizes))}", *said, warned])
            print(*rows[-1], flush=True)
    header = ["group", "idiom", "plan", "plans", "runs", "numbers", "collectives", "warned"]
    count = f"{totals['green']} of {totals['plans']} plans of {len(rows) // 2} idioms are as they should be."
    if not wanted:
        write("conformance", "Steps as other people write them", (count, *NOTES), header, rows)
    else:
        print(count)


if __name__ == "__main__":
    main()
