# SPDX-License-Identifier: Apache-2.0
"""The house is in order: floors, sizes, the README's code, the examples."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pyro_realnvp

ROOT = Path(__file__).parents[1]
MODULES = {path.stem: path for path in (ROOT / "pyro_realnvp").glob("*.py") if path.stem != "__init__"}
FLOORS = [
    {"memo", "shapes", "bijection", "masks", "conditioners", "processes", "history"},
    {"coupling", "elementwise", "support", "reshape", "normalization", "linear", "compose", "checks"},
    {
        "flows",
        "splines",
        "image_flows",
        "distributions",
        "dequantization",
        "checkpoints",
        "rows",
        "data",
        "objective",
        "weights",
        "optimization",
        "warm_start",
        "particles",
        "guide_base",
    },
    {"training", "plots", "guides", "variational", "diagnosis", "neutra", "amortised", "estimator"},
]


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            yield from [node.module] if node.module else [alias.name for alias in node.names]


def test_imports_point_only_downward():
    assert set().union(*FLOORS) == set(MODULES)
    floor_of = {name: k for k, names in enumerate(FLOORS) for name in names}
    for name, path in MODULES.items():
        assert all(floor_of[other] <= floor_of[name] for other in imports_of(path)), name


def test_rooms_are_small():
    assert {name: n for name, path in MODULES.items() if (n := len(path.read_text().splitlines())) > 250} == {}


def test_every_public_name_has_a_docstring():
    for name in dir(pyro_realnvp):
        value = getattr(pyro_realnvp, name)
        if not name.startswith("_") and callable(value):
            assert value.__doc__, name


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_readmes_code_runs(tmp_path, monkeypatch):
    """All blocks, one after the other, in one namespace, with short training."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 5
    namespace: dict = {}
    original = pyro_realnvp.fit
    short = lambda *args, **kwargs: original(*args, **(kwargs | {"num_steps": 3, "progress": False}))  # noqa: E731
    monkeypatch.setattr(pyro_realnvp, "fit", short)
    monkeypatch.setattr(pyro_realnvp.estimator, "fit", short)
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_run_in_short_mode(example, tmp_path):
    command = [sys.executable, str(example), "--num-steps", "4", "--out", str(tmp_path)]
    env = os.environ | {"MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("*.png"))
