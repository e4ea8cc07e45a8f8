"""Fake devices: several CPU devices in one process, so that a laptop runs what a cluster would."""

from __future__ import annotations

import jax

from ffjax.errors import FfjaxError


def fake_devices(n: int = 8, *, cpu_only: bool = True) -> list[jax.Device]:
    """`n` CPU devices in this process, however many cores there are.

    Call it before JAX runs anything: JAX counts its devices once. `cpu_only` also keeps JAX from using
    an accelerator; pass False to have fake devices beside real ones.

    Raises:
        FfjaxError: JAX has started already, with fewer CPU devices or with an accelerator as its default.

    >>> len(fake_devices(8))
    8
    """
    ask_for_fake_devices(n, cpu_only=cpu_only)
    return _started(n, cpu_only)


def ask_for_fake_devices(n: int, *, cpu_only: bool = True) -> None:
    """As `fake_devices`, but does not start JAX: it will have these devices once something runs on it."""
    if n < 1:
        raise FfjaxError(f"fake_devices({n}): ask for at least one device")
    if cpu_only:
        jax.config.update("jax_platforms", "cpu")
    try:
        jax.config.update("jax_num_cpu_devices", n)
    except RuntimeError:  # JAX has started: what it started with may still be enough
        _started(n, cpu_only)


def _started(n: int, cpu_only: bool) -> list[jax.Device]:
    """The first `n` CPU devices; raises FfjaxError where there are fewer."""
    devices = jax.devices("cpu")
    remedy = "ask for them before anything runs on JAX, or set"
    if len(devices) < n:
        raise FfjaxError(
            f"fake_devices({n}): JAX has started already with {len(devices)} CPU device(s); "
            f"{remedy} XLA_FLAGS=--xla_force_host_platform_device_count={n}"
        )
    if cpu_only and jax.default_backend() != "cpu":
        raise FfjaxError(
            f"fake_devices({n}): JAX has started already on {jax.default_backend()}; {remedy} JAX_PLATFORMS=cpu, "
            "or pass cpu_only=False"
        )
    return devices[:n]
