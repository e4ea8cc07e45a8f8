"""The passes of dual ascent over arrays: nodes that share no pair take their turns together.

A pass visits nodes in order: each takes what its pairs with those before it can spare, and spreads it over its pairs
with those after it. What a node finds depends on its neighbours before it alone, so all nodes at one depth (the longest
way of neighbours from a first node) can have their turn at once, and the pass does exactly what visiting them one by
one does. Programs are wide and shallow (each weight's update is a chain of its own): some five hundred nodes are ten
turns, each a dozen operations on arrays.

Slack of all pairs is in one array, each pair's table after the other; so are the nodes' candidates. A pair has two
*sides*: its rows belong to the candidates of its source, its columns to those of its target. A *group* is one row or
one column.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(slots=True, eq=False, kw_only=True)
class Side:
    """One side of a pair: rows for its source, columns for its target. `start`: where the pair's table begins."""

    node: int
    far: int
    """The node on the other side."""
    index_of: Ints
    """For each candidate of `node` its row, or column."""
    start: int
    count: int
    stride: int
    """Of rows, or columns."""
    far_count: int
    far_stride: int


@dataclass(slots=True, eq=False)
class _Sides:
    """Some sides, those of one turn after those of another. Beside each other:

    `entries` (cells of slack, group after group), `group_of` them; `places` (candidates, in their turn), `group` and
    `first` cell of each; `far` and `stride`: which side says where in the group the other node's choice is.
    """

    entries: Ints
    group_of: Ints
    starts: Ints
    places: Ints
    group: Ints
    first: Ints
    far: Ints
    stride: Ints
    order: Ints
    """Places sorted by group, and where each group begins."""
    order_starts: Ints


@dataclass(slots=True, eq=False)
class _Turn:
    """Nodes that take their turn together."""

    nodes: Ints
    cells: Ints
    """Their candidates, one node's after the other's; `starts` and `counts` of each node."""
    starts: Ints
    counts: Ints
    part: Floats
    """For each candidate the share of what it has that each pair to come gets."""
    sides: Ints
    """Of all pairs of these nodes, beside each the node's place in `nodes`, and where its `index_of` begins."""
    side_node: Ints
    index_at: Ints
    taken: _Sides | None
    given: _Sides | None


class Passes:
    """Passes over `theta` and `slack`, which they change.

    Args:
      theta: what each candidate costs, node after node; `sizes`: how many candidates each node has.
      slack: the tables of all pairs.
      sides: two for each pair, its source's and then its target's, beside each other.
    """

    def __init__(self, theta: Floats, sizes: Sequence[int], slack: Floats, sides: Sequence[Side]) -> None:
        self.theta, self.slack = theta, slack
        self._sizes = np.array(sizes, np.int64)
        self._firsts = np.cumsum(self._sizes) - self._sizes
        self._choice = np.zeros(len(sizes), np.int64)
        self._chosen = np.zeros(len(sides), np.int64)
        """For each side the row, or column, of its node's choice."""
        self._sides = sides
        fields = [(s.node, s.far, s.start, s.count, s.stride, s.far_count, s.far_stride) for s in sides]
        self._node, self._far, *self._shape = np.array(fields, np.int64).reshape(-1, 7).T
        lengths = np.array([len(s.index_of) for s in sides], np.int64)
        self._index_at = np.cumsum(lengths) - lengths
        self._index = np.concatenate([np.zeros(0, np.int64), *(s.index_of for s in sides)])
        self._turns = {forward: self._direction(forward) for forward in (True, False)}

    def run(self, *, forward: bool) -> list[int]:
        """One pass; the choice that is met on the way: the best candidate of each node, given those before it."""
        for turn in self._turns[forward]:
            self._take(turn)
        found: list[int] = self._choice.tolist()
        return found

    def _take(self, turn: _Turn) -> None:
        theta, slack = self.theta[turn.cells], self.slack
        total = theta
        if (taken := turn.taken) is not None:
            held = slack[taken.entries]
            spare = np.minimum.reduceat(held, taken.starts)
            slack[taken.entries] = held - spare[taken.group_of]
            theta += np.bincount(taken.places, spare[taken.group], len(theta))
            met = slack[taken.first + self._chosen[taken.far] * taken.stride]
            total = theta + np.bincount(taken.places, met, len(theta))
        least = np.flatnonzero(total == np.repeat(np.minimum.reduceat(total, turn.starts), turn.counts))
        choice = least[np.searchsorted(least, turn.starts)] - turn.starts
        self._choice[turn.nodes] = choice
        self._chosen[turn.sides] = self._index[turn.index_at + choice[turn.side_node]]
        if (given := turn.given) is not None:
            message = np.minimum.reduceat((theta * turn.part)[given.order], given.order_starts)
            theta -= np.bincount(given.places, message[given.group], len(theta))
            slack[given.entries] += message[given.group_of]
        self.theta[turn.cells] = theta

    def _direction(self, forward: bool) -> list[_Turn]:
        nodes = len(self._sizes)
        before: list[list[int]] = [[] for _ in range(nodes)]
        is_taken = self._far < self._node if forward else self._far > self._node
        for node, far in zip(self._node[is_taken].tolist(), self._far[is_taken].tolist(), strict=True):
            before[node].append(far)
        depth = [0] * nodes
        for node in range(nodes) if forward else reversed(range(nodes)):
            depth[node] = 1 + max([depth[far] for far in before[node]], default=-1)
        depths = np.array(depth, np.int64)
        by_depth = np.argsort(depths, kind="stable")
        sizes = self._sizes[by_depth]
        place = np.zeros(nodes, np.int64)
        place[by_depth] = np.cumsum(sizes) - sizes
        turns = np.arange(depths.max(initial=-1) + 2)
        node_bounds = np.searchsorted(depths[by_depth], turns)
        first_places = np.append(place[by_depth], len(self.theta))[node_bounds]
        place -= first_places[depths]
        pairs = np.zeros((2, nodes), np.int64)
        np.add.at(pairs, (is_taken.astype(np.int64), self._node), 1)
        part = 1 / np.maximum(pairs.max(axis=0), 1)
        side_order = np.argsort(depths[self._node], kind="stable")
        side_bounds = np.searchsorted(depths[self._node][side_order], turns)
        order_of = np.zeros(nodes, np.int64)
        order_of[by_depth] = np.arange(nodes)
        found = []
        for turn in range(len(turns) - 1):
            own = by_depth[node_bounds[turn] : node_bounds[turn + 1]]
            sides = side_order[side_bounds[turn] : side_bounds[turn + 1]]
            counts = self._sizes[own]
            found.append(
                _Turn(
                    nodes=own,
                    cells=_ranges(self._firsts[own], counts),
                    starts=np.cumsum(counts) - counts,
                    counts=counts,
                    part=np.repeat(part[own], counts),
                    sides=sides,
                    side_node=order_of[self._node[sides]] - node_bounds[turn],
                    index_at=self._index_at[sides],
                    taken=self._tables(sides[is_taken[sides]], place),
                    given=self._tables(sides[~is_taken[sides]], place),
                )
            )
        return found

    def _tables(self, sides: Ints, place: Ints) -> _Sides | None:
        if not len(sides):
            return None
        start, count, stride, far_count, far_stride = (field[sides] for field in self._shape)
        cells = count * far_count
        row, column = np.divmod(_ranges(np.zeros_like(cells), cells), np.repeat(far_count, cells))
        first_group = np.cumsum(count) - count
        own = self._sizes[self._node[sides]]
        index = self._index[_ranges(self._index_at[sides], own)]
        group = np.repeat(first_group, own) + index
        order = np.argsort(group, kind="stable")
        groups = np.arange(count.sum())
        places = _ranges(place[self._node[sides]], own)
        group_of = np.repeat(first_group, cells) + row
        return _Sides(
            entries=np.repeat(start, cells) + row * np.repeat(stride, cells) + column * np.repeat(far_stride, cells),
            group_of=group_of,
            starts=np.searchsorted(group_of, groups),
            places=places,
            group=group,
            first=np.repeat(start, own) + index * np.repeat(stride, own),
            far=np.repeat(sides ^ 1, own),
            stride=np.repeat(far_stride, own),
            order=places[order],
            order_starts=np.searchsorted(group[order], groups),
        )


def _ranges(starts: Ints, counts: Ints) -> Ints:
    """From each start so many whole numbers, one range after the other."""
    ends = np.cumsum(counts)
    found: Ints = np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - counts), counts)
    return found
