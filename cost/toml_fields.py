"""Typed reading of a TOML table, with errors that name the field and say what to write instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

from ffjax.errors import ClusterError


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`" (did you mean 'h100'?)"`, or nothing where no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


class Fields:
    """One table of a TOML file: each field is read by its type, then `close` refuses what nothing has read.

    `where` names the table in errors, such as `"my.toml, [device]"`; `examples` has one right line for each
    field, for the remedy. Every reader raises ClusterError.
    """

    def __init__(self, table: Mapping[str, object], where: str, examples: Mapping[str, str]) -> None:
        self._table = table
        self._where = where
        self._examples = examples
        self._asked: list[str] = []

    def has(self, key: str) -> bool:
        self._asked.append(key)
        return key in self._table

    def text(self, key: str) -> str:
        value = self._get(key)
        if not isinstance(value, str):
            raise self._wrong(key, value, "a string")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        value = self._get(key)
        if not isinstance(value, list):
            raise self._wrong(key, value, "a list of strings")
        texts = tuple(item for item in value if isinstance(item, str))
        if len(texts) != len(value):
            raise self._wrong(key, value, "a list of strings")
        return texts

    def flag(self, key: str) -> bool:
        value = self._get(key)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def whole(self, key: str) -> int:
        value = self._get(key)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(key, value, "a whole number")
        return value

    def wholes(self, key: str) -> tuple[int, ...]:
        """A whole number, or a list of them."""
        value = self._get(key)
        listed = value if isinstance(value, list) else [value]
        if not listed or any(isinstance(item, bool) or not isinstance(item, int) for item in listed):
            raise self._wrong(key, value, "a whole number, or a list of one for each")
        return tuple(listed)

    def number(self, key: str) -> float:
        value = self._get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(key, value, "a number")
        return float(value)

    def number_or_text(self, key: str) -> int | float | str:
        value = self._get(key)
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise self._wrong(key, value, "a number or a string")
        return value

    def numbers(self, key: str) -> dict[str, float]:
        """A table of numbers with free keys."""
        inner = self.table(key)
        return {name: inner.number(name) for name in inner._table}

    def table(self, key: str) -> Fields:
        value = self._get(key)
        if not isinstance(value, dict):
            raise self._wrong(key, value, "a table")
        return Fields(value, f"{self._where}, [{key}]", self._examples)

    def tables(self, key: str) -> tuple[Fields, ...]:
        value = self._get(key)
        items = value if isinstance(value, list) else [value]
        for item in items:
            if not isinstance(item, dict):
                raise self._wrong(key, value, "a list of tables")
        return tuple(Fields(item, f"{self._where}, [[{key}]] {i}", self._examples) for i, item in enumerate(items, 1))

    def close(self) -> None:
        """Raises ClusterError for a field that nothing has read: a misspelt one must not pass in silence."""
        for key in self._table:
            if key not in self._asked:
                known = ", ".join(dict.fromkeys(self._asked))
                raise ClusterError(
                    f"{self._where}: unknown field {key!r}{did_you_mean(key, self._asked)}; "
                    f"rename or remove it (known: {known})"
                )

    def _get(self, key: str) -> object:
        self._asked.append(key)
        if key not in self._table:
            raise ClusterError(f"{self._where}: field {key!r} is missing; add it, for example: {self._example(key)}")
        return self._table[key]

    def _wrong(self, key: str, value: object, wanted: str) -> ClusterError:
        return ClusterError(f"{self._where}: {key} = {value!r} is not {wanted}; for example: {self._example(key)}")

    def _example(self, key: str) -> str:
        return self._examples.get(key, f"{key} = 1e12")
