"""What the roles of a strategy leave of the search space."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from ffjax.ir.assignment import UNUSED, Assignment
from ffjax.ir.dims import NamedDims
from ffjax.ir.regions import Region, Regions
from ffjax.ir.spec import MeshShape, Spec
from ffjax.strategies.base import Role
from ffjax.strategies.candidates import Allow, Keep
from ffjax.strategies.problem import Problem


class Roles:
    """The restriction that one role per mesh axis makes, for one program."""

    def __init__(self, regions: Regions, dims: NamedDims, mesh: MeshShape, roles: Sequence[Role]) -> None:
        self.roles = roles
        self.mesh = mesh
        graph = regions.graph
        offset = len(graph.program.closures)
        tied = {graph.arguments[offset + arg] for arg, _ in graph.program.ties}
        self.state = {regions.region_of[op] for op in tied}
        self.with_batch = {
            r.id for r in regions.regions if any(dims.is_batch(r.id, atom) for atom in range(len(r.sizes)))
        }
        self.dims = dims
        # What tensor parallelism splits are the dimensions of weights: features, heads, experts, vocabularies.
        self.of_weights: set[int] = set()
        for op in tied:
            for dim in regions.ports[op].results[0]:
                for atom in dim:
                    self.of_weights |= dims.of[regions.region_of[op]][atom]
        self.of_weights -= dims.batch

    def allow(self) -> Allow:
        def allow(region: Region, atom: int, axis: int) -> bool:
            batch = self.dims.is_batch(region.id, atom)
            match self.roles[axis]:
                case Role.DATA:
                    return batch
                case Role.FSDP:
                    return batch or region.id not in self.with_batch
                case Role.TENSOR:
                    return not batch and bool(self.dims.of[region.id][atom] & self.of_weights)
                case Role.FREE:
                    return True

        return allow

    def keep(self) -> Keep | None:
        """Data parallelism splits the batch, and FSDP all state, as finely as they divide, cheaper or not."""
        data = [i for i, role in enumerate(self.roles) if role in (Role.DATA, Role.FSDP)]
        fsdp = [i for i, role in enumerate(self.roles) if role is Role.FSDP]
        if not data:
            return None

        def keep(region: Region, found: Sequence[Assignment]) -> list[Assignment]:
            if region.id in self.with_batch:
                forced = data
            elif region.id in self.state:
                forced = fsdp
            else:
                return list(found)
            pieces = [math.prod(self.mesh.sizes[i] for i in forced if c.atoms[i] != UNUSED) for c in found]
            return [c for c, n in zip(found, pieces, strict=True) if n == max(pieces)]

        return keep

    def forbid(self, problem: Problem) -> Problem:
        """The problem without gathering of state over tensor parallel axes."""
        stationary = {a for a, role in zip(self.mesh.axes, self.roles, strict=True) if role is Role.TENSOR}
        if not stationary:
            return problem
        transfers = []
        for transfer in problem.transfers:
            regions = problem.nodes[transfer.source].regions
            if self.state.isdisjoint(regions) or any(r in self.with_batch for r in regions):
                transfers.append(transfer)
                continue
            extra = np.array(
                [[np.inf if _moves(r, c, stationary) else 0.0 for c in transfer.columns] for r in transfer.rows]
            )
            transfers.append(dataclasses.replace(transfer, seconds=transfer.seconds + extra))
        return dataclasses.replace(problem, transfers=transfers)


def _moves(source: Spec, target: Spec, axes: set[str]) -> bool:
    """Whether one of these axes leaves the dimension that it splits."""
    return any(a in axes and a not in after for before, after in zip(source, target, strict=True) for a in before)
