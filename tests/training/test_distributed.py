# SPDX-License-Identifier: Apache-2.0
"""Training in two processes gives the same result as in one."""

import json

import pytest
from helpers import run_python
from training import distributed_cases

pytestmark = pytest.mark.slow


def torchrun(folder, which):
    """The results of both processes. (More restarts than needed, since on a busy machine gloo may fail to connect.)"""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "10", "--monitor-interval", "0.1", distributed_cases.__file__, str(folder), which]
    run_python(*command, timeout=400)
    return [json.loads((folder / f"{which}_{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return torchrun(tmp_path_factory.mktemp("results"), "all")


@pytest.mark.parametrize("case", [name for name in distributed_cases.CASES if name != "compiled"])
def test_two_processes_train_as_one_does(results, case):
    first, second = (result[case] for result in results)
    assert first == second  # bit for bit
    alone = distributed_cases.CASES[case]()
    if "refused" in first:
        assert ("DistributedSampler" in first["refused"]) or ("2 processes can share; got 33" in first["refused"])
        assert alone["refused"] == ""
        return
    assert len(first["loss"]) == len(alone["loss"]) == {"early": 20, "callback": 25}.get(case, 40)
    for name in ("stopped", "best_step", "layers"):
        assert first[name] == alone[name]
    for name in ("loss", "validation_loss", "weights"):
        assert first[name] == pytest.approx(alone[name], rel=1e-8, abs=1e-8)


def test_two_compiled_processes(results):
    first, second = (result["compiled"] for result in results)
    assert first == second
    assert first["weights"] == pytest.approx(results[0]["rows"]["weights"], rel=1e-6, abs=1e-6)


def test_a_killed_process_is_restarted_and_nothing_is_lost(results, tmp_path):
    resumed = torchrun(tmp_path, "killed")
    assert (tmp_path / "was_killed").exists()
    assert resumed[0]["killed"] == resumed[1]["killed"] == results[0]["rows"]
