# SPDX-License-Identifier: Apache-2.0
"""The project is in order: imports between folders, sizes of modules, docs, the code of the README, examples."""

import ast
import re
import runpy
import sys
import types
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

import pyro_realnvp
from pyro_realnvp import masks, plots

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pyro_realnvp"
MODULES = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in PACKAGE.rglob("*.py")}
# For each folder or module, the folders and modules that it may import from, besides itself.
MAY_IMPORT = {
    "bijections": set(),
    "saving": set(),
    "masks": {"bijections"},
    "flows": {"bijections"},
    "bases": {"bijections", "supports", "mixtures"},
    "supports": {"bijections"},
    "mixtures": set(),
    "domains": {"bases", "bijections", "supports"},
    "distributions": {"bases", "bijections", "domains"},
    "images": {"bijections", "distributions"},
    "training": {"bases", "bijections", "distributions", "saving"},
    "inference": {"bases", "bijections", "supports", "flows", "distributions", "training"},
    "columns": set(),
    "extremes": set(),
    "table_flows": {"bases", "bijections", "columns", "extremes", "flows", "distributions", "mixtures"},
    "ties": {"columns"},
    "estimator": {"columns", "distributions", "extremes", "table_flows", "ties", "training"},
    "classifier": {"estimator"},
    "outliers": {"estimator"},
    "plots": {"bijections/compose", "training/history"},
}


def imports_of(name):
    """The modules of the package that a module imports, by their names in MODULES."""
    package = ["pyro_realnvp", *name.split("/")[:-1]]
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            assert not any(alias.name.split(".")[0] == "pyro_realnvp" for alias in node.names), name
        if isinstance(node, ast.ImportFrom):
            absolute = package[: len(package) - node.level + 1] if node.level else []
            absolute = absolute + (node.module.split(".") if node.module else [])
            if absolute[:1] == ["pyro_realnvp"]:
                whole = "/".join(absolute[1:])
                yield from [whole] if whole in MODULES else ["/".join([*absolute[1:], a.name]) for a in node.names]


def test_folders_import_only_what_they_may():
    for name in MODULES.keys() - {"__init__"}:
        home = name.split("/")[0]
        for other in imports_of(name):
            allowed = MAY_IMPORT[home] | {home}
            assert other in allowed or other.split("/")[0] in allowed, f"{name} imports {other}"


def test_modules_import_in_no_circle():
    arrows = {name: set(imports_of(name)) for name in MODULES}
    while arrows:
        leaves = {name for name, others in arrows.items() if not others & arrows.keys()}
        assert leaves, f"a circle among {sorted(arrows)}"
        arrows = {name: others for name, others in arrows.items() if name not in leaves}


def code_lines(path):
    """The number of lines of code, without blank lines, comments and docstrings."""
    source = path.read_text()
    strings = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]
    documented = {line for node in strings for line in range(node.lineno, node.end_lineno + 1)}
    lines = enumerate(source.splitlines(), start=1)
    return sum(bool(line.strip()) and not line.strip().startswith("#") and k not in documented for k, line in lines)


def test_modules_are_small():
    assert {name: n for name, path in MODULES.items() if (n := code_lines(path)) > 200} == {}


def test_no_module_has_the_name_of_a_public_function():
    functions = {name for name, value in vars(pyro_realnvp).items() if isinstance(value, types.FunctionType)}
    assert functions and not functions & {part for name in MODULES for part in name.split("/")}


def test_every_public_name_has_a_docstring():
    for name in dir(pyro_realnvp):
        value = getattr(pyro_realnvp, name)
        if not name.startswith("_") and callable(value):
            assert value.__doc__, name


def public_names():
    """The public names of the package, and of `masks` and `plots`, whose functions it does not export."""
    ours = {name: value for name, value in vars(pyro_realnvp).items() if isinstance(value, type | types.FunctionType)}
    yield from (name for name in ours if not name.startswith("_"))
    yield from (f"masks.{name}" for name in masks.__all__ if name not in ours)
    drawn = {name for name, value in vars(plots).items() if isinstance(value, types.FunctionType)}
    yield from (f"plots.{name}" for name in drawn if not name.startswith("_"))


def test_every_public_name_is_in_the_docs():
    """Each name appears once, as a directive on a page of the API."""
    pages = "\n".join(path.read_text() for path in (ROOT / "docs" / "api").glob("*.rst"))
    documented = re.findall(r"^\.\. auto(?:class|function):: (?:pyro_realnvp\.)?([\w.]+)", pages, re.MULTILINE)
    assert sorted(documented) == sorted(public_names())


def test_the_citation_and_the_oldest_versions_are_up_to_date():
    assert f"\nversion: {pyro_realnvp.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    project, makefile = (ROOT / "pyproject.toml").read_text(), (ROOT / "Makefile").read_text()
    torch, pyro = (re.search(rf'"{name}>=([\d.]+)"', project)[1] for name in ("torch", "pyro-ppl"))
    assert f"'torch=={torch}.*' pyro-ppl=={pyro} " in makefile


def test_every_benchmark_is_in_the_docs():
    """The table of commands has one line for each, with a link to its section."""
    lists = re.findall(r"^NAMES .?= (\[.*\])$", (ROOT / "benchmarks" / "__main__.py").read_text(), re.MULTILINE)
    names = {name for names in lists for name in re.findall(r'"(\w+)"', names)}
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    assert names | {"mnist"} == set(re.findall(r"^\| \[`(\w+)`\]\(#", page, re.MULTILINE))


PAGES = ["README.md"]
PAGES += [f"docs/{page}.md" for page in ("installation", "choosing", "troubleshooting", "sampling", "modes")]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    """All blocks run one after the other in one namespace, with short training."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert blocks
    namespace: dict = {}
    original = pyro_realnvp.fit
    short = lambda *args, **kwargs: original(*args, **(kwargs | {"num_steps": 3, "progress": False}))  # noqa: E731
    monkeypatch.setattr(pyro_realnvp, "fit", short)
    monkeypatch.setattr(pyro_realnvp.estimator, "fit", short)
    for block in blocks:
        exec(compile(block, page, "exec"), namespace)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_run_in_short_mode(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(example), "--num-steps", "4", "--out", str(tmp_path)])
    runpy.run_path(str(example), run_name="__main__")  # here, since another Python would import torch and Pyro again
    plt.close("all")
    assert list(tmp_path.glob("*.png"))
