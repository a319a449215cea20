# SPDX-License-Identifier: Apache-2.0
"""The installed wheel is complete: it works where the source is not at hand."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from helpers import run_python

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pyro_realnvp"
IMPORT_ALL = """
import importlib, sys
import pyro_realnvp
print(pyro_realnvp.__file__)
for name in sys.argv[1:]:
    print(importlib.import_module(name).__file__)
"""


@pytest.mark.slow
def test_the_sdist_holds_the_tests_and_what_they_read(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for folder in ("benchmarks", "docs", "examples", "pyro_realnvp", "tests"):
        left_out = shutil.ignore_patterns("__pycache__", "_build", "gallery", "sg_execution_times.rst")
        shutil.copytree(ROOT / folder, source / folder, ignore=left_out)
    for pattern in ("*.md", "*.cff", "*.in", "*.toml", "LICENSE", "Makefile", "constraints.txt"):
        for path in ROOT.glob(pattern):
            shutil.copy(path, source)
    run_python("-c", f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})", cwd=source)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    expected = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
    expected = {path.as_posix() for path in expected if ".egg-info" not in str(path)}
    assert expected - names == set()


@pytest.mark.slow
def test_the_wheel_holds_the_whole_package(tmp_path):
    source, wheels, site, empty = (tmp_path / name for name in ("source", "wheels", "site", "empty"))
    # Built from a copy, since a build leaves folders in the source.
    shutil.copytree(PACKAGE, source / "pyro_realnvp", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run_python("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", wheels, source)
    (wheel,) = wheels.glob("*.whl")
    run_python("-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", site, wheel)
    empty.mkdir()

    files = {path.relative_to(ROOT) for path in PACKAGE.rglob("*.py")}
    assert {path for path in files | {Path("pyro_realnvp", "py.typed")} if not (site / path).exists()} == set()
    assert not {path.name for path in site.iterdir()} & {"tests", "benchmarks", "docs", "examples"}
    modules = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in sorted(files)]
    command = [sys.executable, "-c", IMPORT_ALL, *modules]
    env = os.environ | {"PYTHONPATH": str(site), "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=empty, env=env)
    assert done.returncode == 0, done.stderr
    imported = done.stdout.split()
    assert len(imported) == len(modules) + 1 and all(Path(file).is_relative_to(site) for file in imported)
