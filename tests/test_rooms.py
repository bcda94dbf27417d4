"""The plan of the house: imports point down, none runs in a circle, and no file or function is too long."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "lunet_fast"

# From the lowest to the highest: a module may import its own room and lower ones. "" is the package itself,
# with the public names of the layers.
ROOMS = [
    "kernels",
    "ops",
    "functional",
    "layers",
    "",
    "training",
    "recsys",
    "recsys.data",
    "recsys.measures",
    "recsys.model",
    "recsys.serving",
    "recsys.evaluation",
    "recsys.report",
    "density",
    "bench",
    "doctor",
    "cli",
    "__main__",
]
APART = [("density", "recsys")]
"""Rooms that share lower ones and know nothing of each other."""

LAZY = (PACKAGE, f"{PACKAGE}.recsys.serving.recommend")
"""The one import that runs upward: ``lunet_fast.LUNetRecommender``, on first use."""

MOST_LINES, MOST_LINES_OF_A_FUNCTION, MOST_MODULES_OUTSIDE_ROOMS = 600, 80, 3


def _files() -> dict[str, Path]:
    """Every module by its name; ``lunet_fast.kernels`` is a link to ``kernels``."""
    found = {}
    for folder, package in ((ROOT / PACKAGE, [PACKAGE]), (ROOT / "kernels", [PACKAGE, "kernels"])):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if package == [PACKAGE] and parts[0] == "kernels":
                continue
            name = ".".join([*package, *parts]).removesuffix(".__init__")
            found[name] = path
    return found


FILES = _files()
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
SHOWN = {name: str(path.relative_to(ROOT)) for name, path in FILES.items()}


def _nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes, also those within functions, but for what only type checkers read."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for other in node.orelse:
                yield from (other, *_nodes(other))
        else:
            yield from (node, *_nodes(node))


def _imported(name: str) -> set[str]:
    """The modules of the library that a module imports, by the import statement or by name."""
    package = name if FILES[name].name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in _nodes(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            inner = {f"{base}.{alias.name}" for alias in node.names}
            found |= {module if module in FILES else base for module in inner}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found |= {arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    return {module for module in found if module in FILES} - {name}


IMPORTS = {name: {to for to in _imported(name) if (name, to) != LAZY} for name in FILES}


def _room(name: str) -> str:
    inside = name.removeprefix(PACKAGE).removeprefix(".")
    rooms = [room for room in ROOMS if room and (inside == room or inside.startswith(f"{room}."))]
    return max(rooms, key=len) if rooms else ""


@pytest.mark.parametrize("name", FILES, ids=SHOWN.get)
def test_imports_point_down(name: str) -> None:
    room = _room(name)
    assert room or name == PACKAGE, f"{SHOWN[name]} is in none of the rooms: name its room here"
    upward = sorted(to for to in IMPORTS[name] if ROOMS.index(_room(to)) > ROOMS.index(room))
    assert not upward, f"{SHOWN[name]} imports from rooms above its own: {', '.join(upward)}"


@pytest.mark.parametrize("name", [name for name in FILES if _room(name) == "kernels"], ids=SHOWN.get)
def test_kernels_import_nothing_of_the_library(name: str) -> None:
    beyond = [to for to in IMPORTS[name] if _room(to) != "kernels"]
    assert not beyond, f"{SHOWN[name]} imports {', '.join(sorted(beyond))}"


@pytest.mark.parametrize("pair", APART, ids=" and ".join)
def test_rooms_that_know_nothing_of_each_other(pair: tuple[str, str]) -> None:
    for here, there in (pair, pair[::-1]):
        for name in FILES:
            if f"{_room(name)}.".startswith(f"{here}."):
                known = [to for to in IMPORTS[name] if f"{_room(to)}.".startswith(f"{there}.")]
                assert not known, f"{SHOWN[name]} imports {', '.join(sorted(known))}"


def test_no_circles() -> None:
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other: {' <- '.join(error.args[1])}")


def test_few_modules_stand_outside_of_rooms() -> None:
    outside = [path.name for path in sorted((ROOT / PACKAGE).glob("*.py")) if not path.name.startswith("__")]
    assert len(outside) <= MOST_MODULES_OUTSIDE_ROOMS, outside


@pytest.mark.parametrize("name", FILES, ids=SHOWN.get)
def test_files_and_functions_are_short(name: str) -> None:
    lines = len(FILES[name].read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES, f"{SHOWN[name]} has {lines} lines, more than {MOST_LINES}"
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            limit = MOST_LINES_OF_A_FUNCTION
            assert lines <= limit, f"{SHOWN[name]}: {node.name} has {lines} lines, more than {limit}"
