# SPDX-License-Identifier: Apache-2.0
import os

import hypothesis
import pyro
import pytest
import torch
from hypothesis import Phase
from hypothesis.database import DirectoryBasedExampleDatabase

CI = hypothesis.settings(
    deadline=None,
    derandomize=True,
    max_examples=6,
    report_multiple_bugs=False,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
DEEP = {
    "derandomize": False,
    "database": DirectoryBasedExampleDatabase(".hypothesis/examples"),
    "max_examples": 300,
    "phases": set(Phase) - {Phase.explain},  # Hypothesis would trace all of torch to explain a failure
}
hypothesis.settings.register_profile("ci", CI)
hypothesis.settings.register_profile("quick", CI, max_examples=2)
hypothesis.settings.register_profile("deep", CI, **DEEP)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed():
    pyro.enable_validation(True)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
