# SPDX-License-Identifier: Apache-2.0
import io
import sys

import pyro
import pyro.distributions as dist
import torch
from helpers import make_flow
from tqdm.notebook import tqdm_notebook

import pyro_realnvp as rn
from pyro_realnvp.training import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def fit(**options):
    x = torch.linspace(-2, 2, 100).reshape(50, 2)
    return rn.fit(make_flow(), x, num_steps=200, validation=0.0, checkpoint_every=60, **options)


def test_a_file_gets_a_line_for_each_tenth(capsys):
    history = fit()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("|")[0].strip() for line in lines] == [f"{k}0%" for k in range(1, 11)]
    assert "| 20/200 [" in lines[0] and "step/s, loss=" in lines[0]
    assert lines[-1].endswith(f"best={history.best_loss:.3f}]")


def test_a_resumed_training_goes_on_where_it_was(capsys, tmp_path):
    def interrupt(history):
        if len(history.loss) == 130:
            raise KeyboardInterrupt

    fit(callbacks=[interrupt], checkpoint=tmp_path / "c", progress=False)
    fit(checkpoint=tmp_path / "c")
    assert [line.split("%")[0] for line in capsys.readouterr().err.splitlines()] == [" 70", " 80", " 90", "100"]


def test_a_terminal_gets_a_bar_that_is_redrawn(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    fit()
    assert "\r100%|" in terminal.getvalue() and terminal.getvalue().count("\n") == 1


def test_a_notebook_gets_its_own_bar(monkeypatch, capsys):
    class Notebook(tqdm_notebook):  # without widgets, which need a kernel
        def __init__(self, **options):
            vars(self).update(options, shown=[])

        def set_postfix(self, values, refresh):
            self.shown.append(values)

        def update(self, n):
            self.shown.append(n)

        def close(self):
            pass

    monkeypatch.setattr(progress, "tqdm", Notebook)
    bar = progress.Progress(100, show=True)
    bar.update(30, {"loss": "1.0"})
    assert bar.bar.shown == [{"loss": "1.0"}, 30] and not bar.bar.disable and capsys.readouterr().err == ""


def test_no_bar(capsys):
    fit(progress=False)
    assert capsys.readouterr().err == ""


def test_nuts_shows_all_chains(capsys):
    def model():
        pyro.sample("z", dist.Normal(3.0, 0.1))

    guide = rn.AutoRealNVP(model)
    rn.fit_guide(guide, num_steps=20, progress=False)
    rn.neutra(guide, num_samples=10, warmup_steps=10, num_chains=2)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("%")[0] for line in lines] == [f"{10 * k:3}" for k in range(1, 11)]
    assert "| 40/40 [" in lines[-1] and "step size=" in lines[-1] and "acc. prob=" in lines[-1]
