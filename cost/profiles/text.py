"""Profiles as small text files (TOML): one table for each kind of work, one line for each sample.

format = 1
device_kind = "NVIDIA H100 80GB HBM3"
jax = "0.11.0"

[[ops]]
kind = "matmul"
dtype = "bfloat16"
# sizes..., flops, bytes, seconds, spread, runs, date
rows = [
    [1, 4096, 4096, 4096, 137438953472, 100663296, 2.0e-4, 0.01, 30, "2026-01-31"],
]

[[analyses]]  # the same, with rows of sizes..., flops, bytes, compiled flops, compiled bytes
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from ffjax.cost.profiles.files import replace_file
from ffjax.cost.profiles.profile import Analysis, Key, Profile, Sample
from ffjax.errors import ProfileError

FORMAT = 1
_SAMPLE_FIELDS = 6
_ANALYSIS_FIELDS = 4

Entry = TypeVar("Entry", Sample, Analysis)


def to_text(profile: Profile) -> str:
    """The profile as text; equal profiles have equal texts."""
    lines = [f"format = {FORMAT}", f"device_kind = {_quoted(profile.device_kind)}", f"jax = {_quoted(profile.jax)}"]
    lines += _tables("ops", "flops, bytes, seconds, spread, runs, date", profile.samples, _sample_row)
    lines += _tables("analyses", "flops, bytes, compiled flops, compiled bytes", profile.analyses, _analysis_row)
    return "\n".join(lines) + "\n"


def save_text(profile: Profile, path: Path) -> None:
    """Writes the text; a reader never sees half a file. Raises ProfileError where it cannot."""
    replace_file(path, to_text(profile))


def load_text(path: Path) -> Profile:
    """Reads a profile's text; raises ProfileError that names the file, what is wrong with it and the remedy."""
    try:
        return from_text(path.read_text(encoding="utf-8"), path.name)
    except (OSError, UnicodeDecodeError) as error:
        raise ProfileError(f"cannot read the profile {str(path)!r}: {error}. Remedy: check the path.") from error


def from_text(text: str, name: str) -> Profile:
    """The profile that `to_text` wrote; `name` stands for it in messages."""
    try:
        content = tomllib.loads(text)
        if content.get("format") != FORMAT:
            raise ProfileError(
                f"the profile {name!r} has format {content.get('format')!r}, this ffjax reads {FORMAT}. "
                "Remedy: measure again: ffjax profile."
            )
        return Profile(
            name=name,
            device_kind=str(content["device_kind"]),
            jax=str(content["jax"]),
            samples=tuple(_sample(key, row) for key, row in _rows(content.get("ops", []))),
            analyses=tuple(_analysis(key, row) for key, row in _rows(content.get("analyses", []))),
        )
    except (tomllib.TOMLDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, ProfileError):
            raise
        what = f"lacks {error}" if isinstance(error, KeyError) else error
        raise ProfileError(
            f"the profile {name!r} is damaged: {what}. Remedy: restore the file, or measure again: ffjax profile."
        ) from error


def _tables(
    title: str, columns: str, entries: Sequence[Entry], row: Callable[[Entry], Sequence[float | str]]
) -> Iterable[str]:
    groups: dict[Key, list[Entry]] = {}
    for entry in sorted(entries, key=lambda e: (e.key, e.sizes)):
        groups.setdefault(entry.key, []).append(entry)
    for (kind, params, dtype), group in groups.items():
        yield ""
        yield f"[[{title}]]"
        yield from (f"{k} = {_quoted(v)}" for k, v in (("kind", kind), ("params", params), ("dtype", dtype)) if v)
        yield f"# sizes..., {columns}"
        yield "rows = ["
        yield from ("    [" + ", ".join(map(_value, row(e))) + "]," for e in group)
        yield "]"


def _sample_row(s: Sample) -> Sequence[float | str]:
    return (*s.sizes, s.flops, s.bytes, s.seconds, s.spread, s.runs, s.date)


def _analysis_row(a: Analysis) -> Sequence[float | str]:
    return (*a.sizes, a.flops, a.bytes, a.compiled_flops, a.compiled_bytes)


def _rows(tables: Iterable[dict[str, object]]) -> Iterable[tuple[Key, Sequence[float | str]]]:
    for table in tables:
        key = (str(table["kind"]), str(table.get("params", "")), str(table.get("dtype", "")))
        rows = table["rows"]
        if not isinstance(rows, list):
            raise ValueError(f"the rows of {key[0]} are no list")
        for row in rows:
            yield key, row


def _sample(key: Key, row: Sequence[float | str]) -> Sample:
    *sizes, flops, size, seconds, spread, runs, date = _checked(key, row, _SAMPLE_FIELDS)
    return Sample(
        kind=key[0],
        params=key[1],
        dtype=key[2],
        sizes=tuple(float(s) for s in sizes),
        flops=float(flops),
        bytes=float(size),
        seconds=float(seconds),
        spread=float(spread),
        runs=int(runs),
        date=str(date),
    )


def _analysis(key: Key, row: Sequence[float | str]) -> Analysis:
    *sizes, flops, size, compiled_flops, compiled_bytes = _checked(key, row, _ANALYSIS_FIELDS)
    return Analysis(
        kind=key[0],
        params=key[1],
        dtype=key[2],
        sizes=tuple(float(s) for s in sizes),
        flops=float(flops),
        bytes=float(size),
        compiled_flops=float(compiled_flops),
        compiled_bytes=float(compiled_bytes),
    )


def _checked(key: Key, row: Sequence[float | str], least: int) -> Sequence[float | str]:
    if not isinstance(row, list) or len(row) < least:
        raise ValueError(f"a row of {key[0]} is {row!r}, which has not {least} fields or more")
    return row


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _value(value: float | str) -> str:
    if isinstance(value, str):
        return _quoted(value)
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else repr(float(value))
