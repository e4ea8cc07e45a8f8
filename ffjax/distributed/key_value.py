"""The key-value store that the processes of one run share, with the coordinator in process 0.

Keys are written once. Values are texts, compressed: a plan of megabytes is a message of some hundred kilobytes.
"""

from __future__ import annotations

import time
import zlib

import jax

from ffjax.ir.compat import KeyValueClient

_SLICE_S = 2.0
"""How long one request waits: between two of them Python sees to signals."""


class KeyValueStore:
    """The store behind a client of `jax.distributed`."""

    def __init__(self, client: KeyValueClient) -> None:
        self._client = client

    def put(self, key: str, text: str) -> bool:
        """Writes a key; False if it is written already."""
        try:
            self._client.key_value_set_bytes(key, zlib.compress(text.encode()))
        except jax.errors.JaxRuntimeError as error:
            if "ALREADY_EXISTS" in str(error):
                return False
            raise
        return True

    def get(self, key: str, timeout_s: float, slice_s: float = _SLICE_S) -> str | None:
        """The text of a key, as soon as some process writes it; None if none does in time."""
        deadline = time.monotonic() + timeout_s
        while (left_s := deadline - time.monotonic()) > 0:
            try:
                data = self._client.blocking_key_value_get_bytes(key, max(1, int(1000 * min(left_s, slice_s))))
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" in str(error):
                    continue
                raise
            return zlib.decompress(data).decode()
        return None
