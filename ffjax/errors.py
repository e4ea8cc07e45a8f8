"""What ffjax raises and warns: each message quotes the input, then says what to do about it."""

from __future__ import annotations


class FfjaxError(Exception):
    """Everything that ffjax raises on purpose is one of these."""


class ClusterError(FfjaxError, ValueError):
    """A cluster that is unknown, badly described, or not what is attached here."""


class ProfileError(FfjaxError, ValueError):
    """A profile that is damaged, of other devices, or measured under another jax."""


class PlanError(FfjaxError, ValueError):
    """A plan that cannot be found, read or carried out."""


class PlanMismatch(PlanError):
    """A saved plan that was made for another program, other arguments or another cluster."""


class PinError(PlanError):
    """A pin that names nothing in the program, or a sharding that its value cannot have."""


class BudgetError(PlanError):
    """No plan fits the memory budget; the message gives the nearest budget that one would fit."""


class TraceError(FfjaxError, TypeError):
    """A train step, or an argument of one, that cannot be traced."""


class RuleError(FfjaxError):
    """An op sharding rule that cannot be read, or that is registered twice."""


class DistributedError(FfjaxError, RuntimeError):
    """Processes of one run that do not come together, differ from each other, or were lost."""


class HloError(FfjaxError, ValueError):
    """A compiled program, or the text of one, that cannot be read."""


class FfjaxWarning(UserWarning):
    """The answer stands but is slower or less certain than it could be; the message says why."""
