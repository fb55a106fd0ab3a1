"""The layout: imports run one way, in no circle, and CONTRIBUTING shows the packages as they are."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

#: Package -> where it is, and the other packages that it may import.
PACKAGES: dict[str, tuple[Path, frozenset[str]]] = {
    "animesion_scrapers": (ROOT / "scrapers" / "animesion_scrapers", frozenset()),
    "animesion": (ROOT / "animesion", frozenset({"animesion_scrapers"})),
    "animesion_sample": (ROOT / "sample" / "animesion_sample", frozenset({"animesion", "animesion_scrapers"})),
    "animesion_training": (ROOT / "training" / "animesion_training", frozenset({"animesion"})),
}


def modules() -> dict[str, Path]:
    """Every module of the four packages, by its dotted name."""
    found = {}
    for package, (folder, _) in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


def imported(path: Path) -> Iterator[str]:
    """Dotted names that a module imports anywhere, inside functions too; not for type checking alone."""

    def walk(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
                continue
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert not child.level, f"{path} has a relative import"
                yield from (f"{child.module}.{alias.name}" for alias in child.names)
            yield from walk(child)

    return walk(ast.parse(path.read_text(encoding="utf-8")))


def graph() -> dict[str, set[str]]:
    """Module -> modules of ours that it imports."""
    known = modules()
    arrows: dict[str, set[str]] = {name: set() for name in known}
    for name, path in known.items():
        for target in imported(path):
            while target and target not in known:  # a name in a module
                target = target.rpartition(".")[0]
            if target and target != name:
                arrows[name].add(target)
    return arrows


def circle(arrows: Mapping[str, set[str]]) -> list[str]:
    """Names along one circle; empty if there is none."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for target in sorted(arrows[name]):
            if found := visit(target, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(arrows) if (found := visit(name, []))), [])


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_one_way(package: str) -> None:
    _, allowed = PACKAGES[package]
    forbidden = PACKAGES.keys() - allowed - {package}
    for name, targets in graph().items():
        if name.partition(".")[0] == package:
            wrong = {target for target in targets if target.partition(".")[0] in forbidden}
            assert not wrong, f"{name} imports {', '.join(sorted(wrong))}"


def test_no_module_imports_itself_in_a_circle() -> None:
    found = circle(graph())
    assert not found, " -> ".join(found)


def test_no_package_imports_itself_in_a_circle() -> None:
    known = modules()

    def room(name: str) -> str:
        """The package of a module; a module at the top of its package is a room of its own."""
        parts = name.split(".")
        inner = ".".join(parts[:2])
        return inner if len(parts) > 1 and known[inner].name == "__init__.py" else name

    arrows: dict[str, set[str]] = {room(name): set() for name in known}
    for name, targets in graph().items():
        arrows[room(name)] |= {room(target) for target in targets} - {room(name)}
    found = circle(arrows)
    assert not found, " -> ".join(found)


def test_every_package_says_what_it_is_for() -> None:
    silent = [name for name, path in modules().items() if not ast.get_docstring(ast.parse(path.read_text("utf-8")))]
    assert not silent


def test_the_tree_in_contributing_is_current() -> None:
    spec = importlib.util.spec_from_file_location("make_reference", ROOT / "docs" / "make_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8") == module.render_tree(), "run docs/make_reference.py"
