"""DDP, FSDP and tensor parallelism give the numbers of one process: two and four gloo processes.

The promises are functions that every rank runs, in `data_parallel_checks`,
`tensor_parallel_checks` and `sharded_state_checks`; the ranks are started once for all of them.
"""

import data_parallel_checks
import pytest
import ranks
import sharded_state_checks
import tensor_parallel_checks
import torch

CHECKS = {
    2: data_parallel_checks.TWO_RANKS
    + tensor_parallel_checks.TWO_RANKS
    + sharded_state_checks.TWO_RANKS,
    4: tensor_parallel_checks.FOUR_RANKS,
}
SECONDS = 300

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="needs a PyTorch with gloo",
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What went wrong in each check on so many ranks, None where nothing did."""
    seen = {}

    def of(world):
        if world not in seen:
            folder = tmp_path_factory.mktemp("ranks")
            seen[world] = ranks.run(CHECKS[world], world, folder, SECONDS)
        return seen[world]

    return of


@pytest.mark.parametrize("promise", CHECKS[2], ids=lambda promise: promise.__name__)
def test_on_two_ranks(promise, outcomes):
    wrong = outcomes(2)[promise]
    assert wrong is None, wrong


@pytest.mark.parametrize("promise", CHECKS[4], ids=lambda promise: promise.__name__)
def test_on_four_ranks(promise, outcomes):
    wrong = outcomes(4)[promise]
    assert wrong is None, wrong
