"""XLA:GPU's latency-hiding scheduler (`xla/service/latency_hiding_scheduler.cc`) on kernels and collectives.

It works from the end of a program to its start. What may run next is what all readers of have run. Of that, in turn:

1. a collective's end, if none is under way: only one is, at a time;
2. what stalls least: an op is ready one instant after its readers, a collective's start `_LATENCY` after its end;
3. anything before a start that depends on no other collective, unless another one waits to be under way;
4. what most collectives in a row lead to, as those are to be hidden too;
5. what takes as long as is left to wait;
6. what makes most others possible;
7. what comes last in the program.

Hence gradients of weights, which nothing on the way back waits for, run long after the activations that they read are
made, but before collectives that come later on the way back than their own.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

_LATENCY = 5000.0
"""From a collective's start to its end, in the scheduler's units."""
LOOP = 1000.0
"""What an elementwise kernel takes there; all others take 1, matmuls as Triton fusions too."""
_STALL = 3.0
"""From an op to what reads it: the scheduler takes 1, but what is one op here is two or three kernels there."""


class Node:
    """A kernel, or the start or the end of a collective."""

    __slots__ = ("alone", "cost", "depth", "frees", "position", "reads", "ready", "start", "waiting")

    def __init__(
        self, position: float, reads: frozenset[int], cost: float, start: int = -1, alone: bool = False
    ) -> None:
        self.position = position
        self.reads = reads
        self.cost = cost
        self.start = start
        """For the end of a collective the node that is its start."""
        self.alone = alone
        """A loop with collectives of its own: none is under way beside it."""
        self.depth = 0
        self.frees = 0
        self.waiting = 0
        self.ready = 0.0


def schedule(nodes: Sequence[Node]) -> list[int]:
    """The order in which nodes run. Each reads earlier ones in the sequence, or any, as long as there is no cycle."""
    last_reader = [0] * len(nodes)
    starts = {node.start for node in nodes if node.start >= 0}
    for index, node in enumerate(nodes):
        for maker in node.reads:
            nodes[maker].waiting += 1
            last_reader[maker] += index
    for index in _topological(nodes):
        node = nodes[index]
        node.depth = max((nodes[m].depth + (m in starts) for m in node.reads), default=0)
    for node in nodes:
        node.frees = sum(nodes[m].waiting == 1 for m in node.reads)
    now = 0.0
    under_way = -1  # the start of the collective whose end is placed
    heaps: tuple[list[tuple[int, int, float, int]], list[tuple[int, int, float, int]]] = ([], [])
    pending: list[tuple[float, int]] = []
    ends: list[int] = []
    loops: list[int] = []
    placed = [False] * len(nodes)
    backwards: list[int] = []

    def entry(index: int) -> tuple[int, int, float, int]:
        node = nodes[index]
        return (-node.depth, -node.frees, -node.position, index)

    def add(index: int) -> None:
        node = nodes[index]
        if node.start >= 0:
            ends.append(index)
        elif node.alone:
            loops.append(index)
        elif index not in starts:
            if node.ready <= now:
                heapq.heappush(heaps[node.cost > 1], entry(index))
            else:
                heapq.heappush(pending, (node.ready, index))

    def top(heap: list[tuple[int, int, float, int]]) -> tuple[int, int, float, int] | None:
        while heap:
            _, frees, _, index = heap[0]
            if not placed[index] and -frees == nodes[index].frees:
                return heap[0]
            heapq.heappop(heap)
        return None

    def choose() -> int:
        if ends and under_way < 0:
            return min(ends, key=lambda k: (max(nodes[k].ready - now, 0.0), *entry(k)))
        while pending and pending[0][0] <= now:
            index = heapq.heappop(pending)[1]
            heapq.heappush(heaps[nodes[index].cost > 1], entry(index))
        cheap, costly = top(heaps[0]), top(heaps[1])
        free = loops if under_way < 0 else []
        found = [t for t in (cheap, costly) if t is not None]
        found += [entry(k) for k in free if nodes[k].ready <= now]
        best = min(found, default=None)
        if cheap is not None and costly is not None and cheap[0] == costly[0]:
            left = min(
                ([pending[0][0]] if pending else []) + ([nodes[under_way].ready] if under_way >= 0 else []),
                default=None,
            )
            if left is not None and left > now and best in (cheap, costly):
                near = abs(left - now - 1) - abs(left - now - LOOP)
                best = cheap if near < 0 else costly if near > 0 else best
        if under_way >= 0 and nodes[under_way].ready <= now and nodes[under_way].waiting == 0:
            if best is None or ends:
                return under_way
            if nodes[under_way].depth and entry(under_way) < best:
                return under_way
        if best is not None:
            return best[3]
        if under_way >= 0 and (not pending or nodes[under_way].ready <= pending[0][0]):
            return under_way
        return min([(nodes[k].ready, k) for k in free] + pending[:1])[1]

    for index, node in enumerate(nodes):
        if not node.waiting:
            add(index)
    for _ in range(len(nodes)):
        index = choose()
        node = nodes[index]
        placed[index] = True
        backwards.append(index)
        if node.start >= 0:
            ends.remove(index)
            under_way = node.start
        elif node.alone:
            loops.remove(index)
        elif index == under_way:
            under_way = -1
        elif pending and pending[0][1] == index:
            heapq.heappop(pending)
        now = max(now, node.ready) + node.cost
        for maker in node.reads:
            made = nodes[maker]
            made.waiting -= 1
            last_reader[maker] -= index
            made.ready = max(made.ready, now + (_LATENCY if node.start == maker else _STALL))
            if made.waiting == 0:
                add(maker)
            elif made.waiting == 1:
                reader = last_reader[maker]
                nodes[reader].frees += 1
                held = nodes[reader].start >= 0 or nodes[reader].alone or reader in starts
                if not held and not nodes[reader].waiting and nodes[reader].ready <= now:
                    heapq.heappush(heaps[nodes[reader].cost > 1], entry(reader))
    return backwards[::-1]


def _topological(nodes: Sequence[Node]) -> list[int]:
    """The nodes, makers first."""
    readers: list[list[int]] = [[] for _ in nodes]
    missing = [len(node.reads) for node in nodes]
    for index, node in enumerate(nodes):
        for maker in node.reads:
            readers[maker].append(index)
    stack = [index for index, count in enumerate(missing) if not count]
    order: list[int] = []
    while stack:
        index = stack.pop()
        order.append(index)
        for reader in readers[index]:
            missing[reader] -= 1
            if not missing[reader]:
                stack.append(reader)
    if len(order) != len(nodes):
        raise ValueError("the nodes of a schedule wait for each other in a cycle")
    return order
