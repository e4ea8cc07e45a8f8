"""Every code block of the README and of docs/ runs, every docstring's example does, and links lead somewhere.

The python blocks of a page share one namespace, in order, and run in an empty folder that has `examples/`. A block
whose first line is `# name.py` is that file, and imported; its `test_*` functions are called. Of sh blocks the `ffjax`
commands run. A text block is what the code before it prints (`...` for anything). A comment above says otherwise:

    <!-- run ...python... -->       runs, but is not shown: what a page takes for granted
    <!-- parsed only -->            takes too long, or a machine that is not here: syntax, or options, are checked
    <!-- needs a_module -->         likewise where there is no such module
    <!-- exits with 1 -->           of a command
    <!-- figures vary -->           all but the numbers of a text are compared
    <!-- not compared -->           text that is no output, or differs from one machine to another
"""

from __future__ import annotations

import configparser
import contextlib
import doctest
import importlib
import importlib.util
import io
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from ffjax.cli import main

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "examples" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

BLOCK = re.compile(
    r"^(?:<!-- (?P<note>[^>\n]+) -->\n)?```(?P<kind>\w*)\n(?P<code>.*?)^```$|^<!-- run\n(?P<hidden>.*?)^-->$",
    re.MULTILINE | re.DOTALL,
)
LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)")
PARSED_ONLY, NOT_COMPARED, FIGURES_VARY, EXITS = "parsed only", "not compared", "figures vary", "exits with 1"
FIGURE = re.compile(r"[+-]*\d[\d.,]*(e-?\d+)? ?(GiB|MiB|KiB|B|ms|us|ns|s|%)?(?!\w)")
COMING = {"multi_host.md", "checkpoints.md"}  # links to pages that are still being written
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass(frozen=True)
class Block:
    kind: str
    code: str
    note: str
    line: int


def blocks(text: str) -> Iterator[Block]:
    for match in BLOCK.finditer(text):
        hidden = match["hidden"]
        start = match.start("code" if hidden is None else "hidden")
        yield Block(
            kind=match["kind"] if hidden is None else "python",
            code=match["code"] if hidden is None else hidden,
            note=match["note"] or "",
            line=text.count("\n", 0, start),
        )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where a page runs; modules that it makes there are forgotten with it."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize("page", [p.relative_to(ROOT).as_posix() for p in PAGES])
@pytest.mark.usefixtures("folder")
def test_page(page: str) -> None:
    text = (ROOT / page).read_text()
    namespace: dict[str, Any] = {"__name__": "page"}
    printed = ""
    found = list(blocks(text))
    assert len(found) == text.count("\n```") // 2 + text.count("<!-- run\n"), "a block that is not understood"
    for block in found:
        where = f"{page}:{block.line}"
        match block.kind:
            case "python":
                printed = run_python(block, page, namespace)
            case "sh":
                printed = "".join(run_command(line, block.note, where) for line in commands(block.code))
            case "text":
                if block.note != NOT_COMPARED:
                    compare(block.code, printed, where, figures=block.note != FIGURES_VARY)
            case "toml":
                tomllib.loads(block.code)
            case "ini":
                configparser.ConfigParser().read_string(block.code)
            case _:
                assert block.note == NOT_COMPARED, f"{where}: what kind of block is this?"


def run_python(block: Block, page: str, namespace: dict[str, Any]) -> str:
    """Runs a block under its own file and line; what it prints."""
    code = compile("\n" * block.line + block.code, page, "exec", dont_inherit=True)
    needs = re.fullmatch(r"needs (\w+)", block.note)
    if block.note == PARSED_ONLY or (needs and importlib.util.find_spec(needs[1]) is None):
        return ""
    before = dict(namespace)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        if name := re.match(r"# (\w+)\.py\n", block.code):
            Path(f"{name[1]}.py").write_text(block.code)
            importlib.invalidate_caches()
            namespace |= vars(importlib.import_module(name[1]))
        else:
            exec(code, namespace)
        for key, value in list(namespace.items()):
            if key.startswith("test_") and before.get(key) is not value:
                value()
    return out.getvalue()


def commands(code: str) -> list[str]:
    """Those of ffjax; what else a shell does is not ours."""
    return [line for line in code.replace("\\\n", " ").splitlines() if line.startswith("ffjax ")]


def run_command(line: str, note: str, where: str) -> str:
    args = shlex.split(line, comments=True)[1:]
    if note == PARSED_ONLY:
        with click.Context(main, info_name="ffjax") as context:
            name, command, rest = main.resolve_command(context, args)
            assert command is not None
            command.make_context(name, rest, parent=context)
        return ""
    result = CliRunner().invoke(main, args)
    assert result.exit_code == (note == EXITS), f"{where}: {line}\n{result.output}"
    return result.stdout


def compare(expected: str, printed: str, where: str, *, figures: bool) -> None:
    if not figures:
        expected, printed = (FIGURE.sub("#", text) for text in (expected, printed))
    printed = printed.rstrip() + "\n"
    checker, example = doctest.OutputChecker(), doctest.Example("", expected)
    if not checker.check_output(expected, printed, FLAGS):
        raise AssertionError(f"{where}: {checker.output_difference(example, printed, FLAGS)}")


@pytest.mark.parametrize("page", [p.relative_to(ROOT).as_posix() for p in PAGES])
def test_links_lead_somewhere(page: str) -> None:
    folder = (ROOT / page).parent
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    missing = {link for link in LINK.findall(text) if not (folder / link).exists()}
    assert missing <= COMING


def test_every_page_is_in_the_index() -> None:
    listed = set(LINK.findall((ROOT / "docs" / "README.md").read_text()))
    assert {p.name for p in (ROOT / "docs").glob("*.md")} - {"README.md"} <= listed


def modules_with_examples() -> list[str]:
    """Of the package, without importing them."""
    trees = {ROOT / "ffjax": "ffjax", ROOT / "cost": "ffjax.cost", ROOT / "strategies": "ffjax.strategies"}
    found = []
    for tree, package in trees.items():
        for path in sorted(tree.rglob("*.py")):
            if ">>> " in path.read_text():
                parts = path.relative_to(tree).with_suffix("").parts
                found.append(".".join([package, *(part for part in parts if part != "__init__")]))
    return found


@pytest.mark.parametrize("module", modules_with_examples())
def test_docstring_examples(module: str) -> None:
    result = doctest.testmod(importlib.import_module(module), optionflags=FLAGS)
    assert not result.failed
