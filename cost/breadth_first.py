"""XLA:CPU's scheduler (`xla/service/hlo_memory_scheduler.cc`, breadth first) on kernels and collectives.

What needs nothing is in a queue; what comes first in it runs, and what that makes possible joins at the end. So
kernels run in the order of how many of them, one after the other, come before: weights are gathered and zeros are
written at the start of a step, and recomputation that nothing holds back runs as soon as what it reads is there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from ffjax.cost.latency_hiding import Node


def breadth_first(nodes: Sequence[Node]) -> list[int]:
    """The order in which nodes run. A collective is done as it starts."""
    readers: list[list[int]] = [[] for _ in nodes]
    missing = [len(node.reads) for node in nodes]
    for index, node in enumerate(nodes):
        for maker in node.reads:
            readers[maker].append(index)
    queue = deque(sorted((i for i, count in enumerate(missing) if not count), key=lambda i: nodes[i].position))
    order: list[int] = []
    while queue:
        index = queue.popleft()
        order.append(index)
        free = []
        for reader in readers[index]:
            missing[reader] -= 1
            if not missing[reader]:
                free.append(reader)
        for reader in sorted(free, key=lambda i: nodes[i].position):
            if nodes[reader].start == index:
                queue.appendleft(reader)
            else:
                queue.append(reader)
    if len(order) != len(nodes):
        raise ValueError("the nodes of a schedule wait for each other in a cycle")
    return order
