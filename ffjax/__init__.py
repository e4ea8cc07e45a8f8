"""Automatic parallelization for JAX: an ordinary single-device train step, run the fastest way on a cluster.

PYTEST_DONT_REWRITE, or pytest, which finds a plugin in this distribution, would warn where ffjax is imported before it.
"""

from ffjax.autoshard import autoshard
from ffjax.cost.cluster import Cluster
from ffjax.cost.simulation.timeline import Timeline
from ffjax.pareto import Front, pareto
from ffjax.plan import Plan
from ffjax.planning.planner import plan

__version__ = "0.1.0"

__all__ = ["Cluster", "Front", "Plan", "Timeline", "__version__", "autoshard", "pareto", "plan"]
