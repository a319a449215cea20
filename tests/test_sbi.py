# SPDX-License-Identifier: Apache-2.0
"""The recipe for sbi in the docs, in a process of its own: sbi imports Zuko, which turns validation off everywhere."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers import run_python

PAGE = Path(__file__).parents[1] / "docs" / "coming_from.md"
CHECKS = """
sd = 0.2**0.5  # the exact posterior is N(0.8 x, 0.2)
exact = torch.distributions.Normal(0.8 * observed, sd)
assert ((samples.mean(0) - exact.mean).abs() < 0.3 * sd).all(), samples.mean(0)
assert ((samples.std(0) / sd - 1).abs() < 0.2).all(), samples.std(0)
error = posterior.log_prob(samples, x=observed) - exact.log_prob(samples).sum(-1)
assert error.abs().mean() < 0.2, error
assert (z.mean(0).abs() < 0.15).all() and ((z.std(0) - 1).abs() < 0.15).all(), z
condition = x[:7, None]  # broadcasts with the samples, as sbi's docstring says
whole, one = (estimator.inverse_transform(samples, given) for given in (condition, x[3]))
torch.testing.assert_close(whole[3], one)
from sbi.diagnostics.lc2st import LC2ST_NF
tests = [posterior.sample((1,), x=one, show_progress_bars=False) for one in x[:100]]
lc2st = LC2ST_NF(
    theta[:100], x[:100], torch.cat(tests), flow_inverse_transform=estimator.inverse_transform, flow_base_dist=prior,
    num_trials_null=10,
)
lc2st.train_under_null_hypothesis(verbosity=0)
lc2st.train_on_observed_data(verbosity=0)
assert 0 <= lc2st.p_value(observed) <= 1
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("sbi") is None, reason="sbi belongs to the bench extra")
def test_the_recipe_for_sbi_gives_the_exact_posterior(tmp_path):
    (recipe,) = re.findall(r"## In sbi.*```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    seeded = "import torch; torch.manual_seed(0)\n" + recipe
    short = seeded.replace("inference.train()", "inference.train(max_num_epochs=20)")
    assert short != seeded
    run_python("-c", short + CHECKS, cwd=tmp_path)
