"""The shape of the repository: which package may import which, how large things get, paths that the guides name."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("dvi_jax", "conversion", "kangaroo_ref", "experiments")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
FORBIDDEN = {
    "dvi_jax": {"torch", "transformers", "conversion", "kangaroo_ref", "experiments"},
    "kangaroo_ref": {"jax", "dvi_jax.model", "dvi_jax.decode", "conversion", "experiments"},
    "conversion": {"experiments"},
}


# The one way from the library to what may use PyTorch: reading .bin files, by name, when one is met.
EXCEPTIONS = {"dvi_jax/importing/weight_files.py": {"conversion"}}


def imported(tree: ast.Module) -> set[str]:
    """Every module a file imports, also by a name in a string, with its parents."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            (name, *_) = node.args
            assert isinstance(name, ast.Constant), "an import by a name that nobody can check"
            names.add(name.value)
    return {".".join(name.split(".")[: i + 1]) for name in names for i in range(name.count(".") + 1)}


def identifier(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=identifier)
def test_source_file(path):
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    forbidden = FORBIDDEN.get(path.relative_to(ROOT).parts[0], set())
    if forbidden:
        assert imported(tree) & forbidden == EXCEPTIONS.get(identifier(path), set())
    assert text.count("\n") <= 400
    assert ast.get_docstring(tree) or not text.strip(), "say what the file owns"
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert [f.name for f in functions if f.end_lineno - f.lineno + 1 > 60] == []
    handlers = [node.type for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler)]
    assert all(handler is not None for handler in handlers)


@pytest.mark.parametrize("guide", ["README.md", "AGENTS.md", "experiments/README.md", "experiments/results/README.md"])
def test_guides_name_what_exists(guide):
    """Paths in backquotes, modules run with -m, and names a guide attributes to a file."""
    text = (ROOT / guide).read_text(encoding="utf-8")
    paths = re.findall(r"`((?:dvi_jax|conversion|kangaroo_ref|experiments|tests|docs)/[\w./]*)`", text)
    missing = [path for path in paths if not (ROOT / path).exists()]
    modules = set(re.findall(r"-m ((?:dvi_jax|conversion|experiments)[\w.]*)", text))
    for module in modules:
        place = ROOT / module.replace(".", "/")
        if not (place.with_suffix(".py").exists() or (place / "__main__.py").exists()):
            missing.append(module)
    assert modules
    assert missing == []


def test_the_table_of_known_names_is_true():
    """`path.py`: `name` in AGENTS.md: the file defines that function, class or method."""
    text = (ROOT / "AGENTS.md").read_text(encoding="utf-8")
    claims = re.findall(r"`([\w/]+\.py)`: ((?:`[\w.]+`(?: / )?)+)", text)
    checked = 0
    for path, names in claims:
        source = (ROOT / path).read_text(encoding="utf-8")
        for name in re.findall(r"`([\w.]+)`", names):
            assert re.search(rf"(def|class) {name.split('.')[-1]}\b", source), f"{path} has no {name}"
            checked += 1
    assert checked >= 4
