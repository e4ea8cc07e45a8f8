"""The database of profiles: one sqlite file with the samples of any number of device kinds and versions of jax.

Every write is one transaction, so several processes may measure into one database and none leaves half an entry. A
file that is no such database is never changed or removed: the error says what to do with it.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import astuple
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from ffjax.cost.profiles.profile import Analysis, Profile, Sample
from ffjax.cost.profiles.text import from_text, load_text
from ffjax.errors import ProfileError

DATABASE = Path.home() / ".cache" / "ffjax" / "profiles.sqlite"
"""Where `ffjax profile` keeps what it measured, and where `Cluster.local()` looks."""

SHIPPED: Traversable = resources.files("ffjax.cost").joinpath("measured")
"""Profiles that come with ffjax."""

FORMAT = 1
_WAIT_S = 60.0  # for another process's transaction

_KEY = "kind, params, dtype, sizes, flops, bytes"
_COMPILED = "compiled_flops, compiled_bytes"
_SCHEMA = (
    """CREATE TABLE IF NOT EXISTS samples (
        device_kind TEXT, jax TEXT, kind TEXT, params TEXT, dtype TEXT, sizes TEXT, flops REAL, bytes REAL,
        seconds REAL, spread REAL, runs INTEGER, date TEXT,
        PRIMARY KEY (device_kind, jax, kind, params, dtype, sizes))""",
    """CREATE TABLE IF NOT EXISTS analyses (
        device_kind TEXT, jax TEXT, kind TEXT, params TEXT, dtype TEXT, sizes TEXT, flops REAL, bytes REAL,
        compiled_flops REAL, compiled_bytes REAL,
        PRIMARY KEY (device_kind, jax, kind, params, dtype, sizes))""",
)


class ProfileStore:
    """A database file, made at the first write. Every method raises ProfileError that names the file.

    >>> ProfileStore(DATABASE.parent / "not-there.sqlite").groups()
    []
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def groups(self) -> list[tuple[str, str]]:
        """What it has measurements of: (device kind, jax), the latest first."""
        if not self.path.exists():
            return []
        with self._open() as database:
            rows = database.execute(
                "SELECT device_kind, jax FROM (SELECT device_kind, jax, date FROM samples "
                "UNION ALL SELECT device_kind, jax, '' FROM analyses) GROUP BY 1, 2 ORDER BY max(date) DESC, 1, 2"
            ).fetchall()
        return [(str(kind), str(jax)) for kind, jax in rows]

    def profile(self, device_kind: str, jax: str) -> Profile:
        """All of one device kind under one jax; it may be empty."""
        samples: list[Sample] = []
        analyses: list[Analysis] = []
        if self.path.exists():
            with self._open() as database:
                which, key = "WHERE device_kind = ? AND jax = ? ORDER BY kind, params, dtype, sizes", (device_kind, jax)
                for row in database.execute(f"SELECT {_KEY}, seconds, spread, runs, date FROM samples {which}", key):
                    kind, params, dtype, sizes, flops, size, seconds, spread, runs, date = row
                    samples.append(
                        Sample(
                            kind=kind,
                            params=params,
                            dtype=dtype,
                            sizes=_sizes(sizes),
                            flops=flops,
                            bytes=size,
                            seconds=seconds,
                            spread=spread,
                            runs=runs,
                            date=date,
                        )
                    )
                for row in database.execute(f"SELECT {_KEY}, {_COMPILED} FROM analyses {which}", key):
                    kind, params, dtype, sizes, flops, size, compiled_flops, compiled_bytes = row
                    analyses.append(
                        Analysis(
                            kind=kind,
                            params=params,
                            dtype=dtype,
                            sizes=_sizes(sizes),
                            flops=flops,
                            bytes=size,
                            compiled_flops=compiled_flops,
                            compiled_bytes=compiled_bytes,
                        )
                    )
        return Profile(
            name=self.path.name, device_kind=device_kind, jax=jax, samples=tuple(samples), analyses=tuple(analyses)
        )

    def add(self, profile: Profile) -> None:
        """Puts in all that a profile holds; a sample that is there already is replaced."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ProfileError(
                f"cannot make the folder of {str(self.path)!r}: {error}. Remedy: name another."
            ) from error
        with self._open(write=True) as database:
            for table, entries in (("samples", profile.samples), ("analyses", profile.analyses)):
                rows = [_row(profile, entry) for entry in entries]
                if rows:
                    marks = ", ".join("?" * len(rows[0]))
                    database.executemany(f"INSERT OR REPLACE INTO {table} VALUES ({marks})", rows)

    @contextlib.contextmanager
    def _open(self, *, write: bool = False) -> Iterator[sqlite3.Connection]:
        """The database, inside one transaction."""
        mode = "rwc" if write else "ro"
        try:
            database = sqlite3.connect(
                f"{self.path.absolute().as_uri()}?mode={mode}", uri=True, timeout=_WAIT_S, isolation_level=None
            )
            with contextlib.closing(database):
                database.execute("BEGIN IMMEDIATE" if write else "BEGIN")
                found = database.execute("PRAGMA user_version").fetchone()[0]
                is_new = database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
                if found != FORMAT and not is_new:
                    raise ProfileError(
                        f"the profile database {str(self.path)!r} has format {found}, this ffjax reads {FORMAT}. "
                        "Remedy: name another database, or move this one away and measure again: ffjax profile."
                    )
                if write and is_new:
                    for statement in _SCHEMA:
                        database.execute(statement)
                    database.execute(f"PRAGMA user_version = {FORMAT}")
                if write or not is_new:
                    yield database
                    database.execute("COMMIT")
                else:
                    raise ProfileError(
                        f"the profile database {str(self.path)!r} is empty. Remedy: measure into it: ffjax profile."
                    )
        except sqlite3.OperationalError as error:
            raise ProfileError(
                f"cannot {'write' if write else 'read'} the profile database {str(self.path)!r}: {error}. Remedy: "
                "check that the file and its folder are yours and held by no other process, or name another database."
            ) from error
        except (sqlite3.DatabaseError, TypeError, ValueError) as error:
            if isinstance(error, ProfileError):
                raise
            raise ProfileError(
                f"the profile database {str(self.path)!r} is damaged: {error}. Nothing was changed. Remedy: move it "
                "away and measure again (ffjax profile), or save what can be read: "
                f"sqlite3 {self.path.name} .recover | sqlite3 saved.sqlite"
            ) from error


def open_profile(path: str | Path, device_kind: str, jax: str, *, accept_other: bool = False) -> Profile:
    """The profile in a text file (`.toml`), or what a database holds of one device kind under one jax.

    A bare name that is no file is that of a shipped one (`measured/NAME.toml`).
    Raises ProfileError where there is none; `accept_other` takes the latest of another kind or jax instead.
    """
    path = Path(path)
    if not path.is_file():
        shipped = SHIPPED.joinpath(f"{path}.toml")
        if path.name == str(path) and shipped.is_file():
            return from_text(shipped.read_text(encoding="utf-8"), shipped.name)
        raise ProfileError(
            f"there is no profile {str(path)!r}. Remedy: check the path, or measure: ffjax profile --out {path.name}"
        )
    if path.suffix == ".toml":
        return load_text(path)
    store = ProfileStore(path)
    groups = store.groups()
    if (device_kind, jax) in groups:
        return store.profile(device_kind, jax)
    if accept_other and groups:
        alike = [g for g in groups if g[0] == device_kind] or groups
        return store.profile(*alike[0])
    listed = "; ".join(f"{kind!r} with jax {version}" for kind, version in groups) or "nothing"
    raise ProfileError(
        f"the profile database {str(path)!r} has no measurements of {device_kind!r} with jax {jax}; it has {listed}. "
        "Remedy: measure there (ffjax profile), or accept another kind's or version's by name (accept_other)."
    )


def _row(profile: Profile, entry: Sample | Analysis) -> Sequence[object]:
    kind, params, dtype, sizes, *figures = astuple(entry)
    return (profile.device_kind, profile.jax, kind, params, dtype, json.dumps(sizes), *figures)


def _sizes(text: str) -> tuple[float, ...]:
    return tuple(float(s) for s in json.loads(text))
