"""What the roles of a strategy leave of the search space."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from ffjax.ir.assignment import UNUSED, Assignment
from ffjax.ir.regions import Region
from ffjax.ir.spec import MeshShape, Spec
from ffjax.strategies.base import Role
from ffjax.strategies.candidates import is_by_hand
from ffjax.strategies.problem import Problem, Transfer, restrict
from ffjax.strategies.usage import Usage

SPLIT_DATA = (Role.DATA, Role.FSDP, Role.ZERO1, Role.ZERO2, Role.EXPERT, Role.SEQUENCE, Role.SPATIAL)
"""Roles that split activations as finely as they divide, cheaper or not."""


def lacking(usage: Usage, roles: Sequence[Role]) -> str:
    """What a program would have to have for these roles to mean anything in it; empty if it has it."""
    if Role.SEQUENCE in roles and not usage.sequence:
        return "activations with a dimension beside the batch that products with weights pass through"
    if Role.EXPERT in roles and not usage.experts:
        return "products of activations with weights that are apart for each of several experts"
    if Role.SPATIAL in roles and not usage.images:
        return "convolutions or pooling over images that divide evenly"
    return ""


class Roles:
    """The restriction that one role per mesh axis makes, for one program."""

    def __init__(self, usage: Usage, mesh: MeshShape, roles: Sequence[Role]) -> None:
        self.usage = usage
        self.mesh = mesh
        self.roles = roles

    def within(self, problem: Problem) -> Problem | None:
        """What the strategy leaves of a problem (which pins may have restricted before); None if that is nothing."""
        kept = []
        for node in problem.nodes:
            region = problem.regions.regions[node.regions[0]]
            if is_by_hand(problem.regions, region):
                kept.append(list(range(len(node.candidates))))
                continue
            allowed = [
                {UNUSED, *(atom for atom in range(len(region.sizes)) if self._allows(region, atom, role))}
                for role in self.roles
            ]
            found = [
                candidate
                for candidate in node.candidates
                if all(atom in may for atom, may in zip(candidate.atoms, allowed, strict=True))
            ]
            chosen = set(self._kept(region, found))
            kept.append([i for i, candidate in enumerate(node.candidates) if candidate in chosen])
        return self._forbid(restrict(problem, kept)) if all(kept) else None

    def _allows(self, region: Region, atom: int, role: Role) -> bool:
        usage = self.usage
        batch = usage.dims.is_batch(region.id, atom)
        activation = region.id in usage.with_batch
        match role:
            case Role.DATA:
                return batch
            case Role.FSDP:
                return batch or not activation
            case Role.ZERO1 | Role.ZERO2:
                return batch or not (activation or region.id in usage.forward)
            case Role.TENSOR:
                return not batch and usage.is_for(region.id, atom, usage.weights)
            case Role.SEQUENCE:
                elsewhere = activation and region.id not in usage.products
                return not batch and usage.is_for(
                    region.id, atom, usage.weights | usage.sequence if elsewhere else usage.weights
                )
            case Role.EXPERT:
                expert = usage.is_for(region.id, atom, usage.experts)
                return batch or expert or not (activation or usage.has(region.id, usage.experts))
            case Role.SPATIAL:
                return usage.is_for(region.id, atom, usage.images)
            case Role.FREE:
                return True

    def _kept(self, region: Region, found: Sequence[Assignment]) -> Sequence[Assignment]:
        """What a strategy splits at all it splits as finely as it divides, cheaper or not."""
        usage = self.usage
        data = self._axes(*SPLIT_DATA)
        if not data:
            return found
        if region.id in usage.with_batch:
            zero1 = self._axes(Role.ZERO1)
            whole = [c for c in found if all(c.scatter[i] == UNUSED for i in zero1)]
            split = _most(whole, self._pieces, data)
            return _most(split, self._scattered, self._axes(Role.ZERO2)) if usage.is_gradient(region) else split
        return _most(found, self._pieces, self._of_state(region.id)) if region.id in usage.state else found

    def _axes(self, *roles: Role) -> list[int]:
        return [i for i, role in enumerate(self.roles) if role in roles]

    def _of_state(self, region: int) -> list[int]:
        """The axes that split state of a region wherever they divide it."""
        roles = [Role.FSDP]
        if region not in self.usage.forward:
            roles += [Role.ZERO1, Role.ZERO2]
        if self.usage.has(region, self.usage.experts):
            roles += [Role.EXPERT]
        return self._axes(*roles)

    def _pieces(self, candidate: Assignment, axes: Sequence[int]) -> int:
        return math.prod(self.mesh.sizes[i] for i in axes if candidate.atoms[i] != UNUSED)

    def _scattered(self, candidate: Assignment, axes: Sequence[int]) -> int:
        return math.prod(self.mesh.sizes[i] for i in axes if candidate.scatter[i] != UNUSED)

    def _forbid(self, problem: Problem) -> Problem:
        """The problem without gathering of state over the axes that leave it where it is."""

        def held(transfer: Transfer) -> Transfer:
            axes = self._held(problem.nodes[transfer.source].regions)
            if not axes:
                return transfer
            extra = [[np.inf if _moves(r, c, axes) else 0.0 for c in transfer.columns] for r in transfer.rows]
            return dataclasses.replace(transfer, seconds=transfer.seconds + np.array(extra))

        return dataclasses.replace(problem, transfers=[held(t) for t in problem.transfers])

    def _held(self, regions: Sequence[int]) -> set[str]:
        """The axes along which state of these regions, which are alike, stays as it is."""
        usage = self.usage
        if usage.state.isdisjoint(regions) or not usage.with_batch.isdisjoint(regions):
            return set()
        axes = self._axes(Role.TENSOR, Role.SEQUENCE)
        if usage.has(regions[0], usage.experts):
            axes += self._axes(Role.EXPERT)
        return {self.mesh.axes[i] for i in axes}


def _most(
    found: Sequence[Assignment], count: Callable[[Assignment, Sequence[int]], int], axes: Sequence[int]
) -> list[Assignment]:
    """Those of which these axes make most pieces."""
    if not axes or not found:
        return list(found)
    counts = [count(c, axes) for c in found]
    return [c for c, n in zip(found, counts, strict=True) if n == max(counts)]


def _moves(source: Spec, target: Spec, axes: set[str]) -> bool:
    """Whether one of these axes leaves the dimension that it splits."""
    return any(a in axes and a not in after for before, after in zip(source, target, strict=True) for a in before)
