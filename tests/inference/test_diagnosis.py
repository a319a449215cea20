# SPDX-License-Identifier: Apache-2.0
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.importance import psis_diagnostic

import pyro_realnvp as rn


def test_diagnose_agrees_with_pyro_and_tells_good_from_poor():
    def wide():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def narrow():
        pyro.sample("z", dist.Normal(0.0, 0.4))

    poor = rn.diagnose(narrow, model=wide, num_samples=4000)
    assert poor.pareto_k > 0.7 and "poor: train longer" in str(poor) == repr(poor)
    pyro.set_rng_seed(1)
    ours = rn.diagnose(narrow, model=wide, num_samples=2000)
    pyro.set_rng_seed(1)
    theirs = [float(psis_diagnostic(wide, narrow, num_particles=2000)) for _ in range(5)]
    assert min(theirs) - 0.3 < ours.pareto_k < max(theirs) + 0.3
    good = rn.diagnose(wide, model=wide)
    assert good.effective_sample_size == pytest.approx(2000) and good.log_evidence == pytest.approx(0.0, abs=1e-5)


def test_resampling_corrects_a_guide():
    def model():
        z = pyro.sample("z", dist.Normal(1.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(3.0))

    def guide():
        pyro.sample("z", dist.Normal(1.0, 1.5))

    report = rn.diagnose(guide, model=model, num_samples=20_000)
    draws = report.resample(20_000)["z"]
    assert draws.mean() == pytest.approx(2.0, abs=0.05) and draws.std() == pytest.approx(0.5**0.5, abs=0.03)
    exact = dist.Normal(1.0, 2**0.5).log_prob(torch.tensor(3.0)).item()
    assert abs(report.log_evidence - exact) < 4 * report.log_evidence_error
