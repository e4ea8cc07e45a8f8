"""Plans in a line of text each, for files of recorded figures."""

from __future__ import annotations

from collections.abc import Sequence

from ffjax.ir.assignment import UNUSED, Assignment
from ffjax.ir.layout import Layout
from ffjax.ir.regions import Regions
from ffjax.ir.spec import MeshShape
from ffjax.strategies.families import family_keys, members


def line_of(layout: Layout) -> str:
    """For each family, in order, the atom of each mesh axis, and where sums are scattered."""

    def text(a: Assignment) -> str:
        return ",".join(
            "" if atom == UNUSED else f"{atom}" if to == UNUSED else f"{atom}>{to}"
            for atom, to in zip(a.atoms, a.scatter, strict=True)
        )

    families = members(family_keys(layout.regions))
    return " ".join(text(layout.assignments[regions[0]]) or "-" for regions in families.values())


def layout_of(
    line: str, regions: Regions, keys: Sequence[str], mesh: dict[str, int], axis_prices: tuple[float, ...] | None = None
) -> Layout:
    """The plan of a line, on its program; raises ValueError if the program has other families."""
    chosen = [Assignment((UNUSED,) * len(mesh), (UNUSED,) * len(mesh))] * len(regions.regions)
    for entry, family in zip(line.split(" "), members(keys).values(), strict=True):
        if entry == "-":
            continue
        parts = [p.partition(">") for p in entry.split(",")]
        atoms, scatter = ([int(p[i]) if p[i] else UNUSED for p in parts] for i in (0, 2))
        for region in family:
            chosen[region] = Assignment(tuple(atoms), tuple(scatter))
    shape = MeshShape(tuple(mesh), tuple(mesh.values()))
    return Layout(regions=regions, mesh=shape, assignments=chosen, axis_prices=axis_prices or (1.0,) * len(mesh))
