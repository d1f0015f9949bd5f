"""Ranks that meet by torch.distributed give the bits of one: gloo, with the calls that NCCL gets between cards."""

from collections.abc import Iterator
from contextlib import closing

import pytest
import torch
from test_ranks import ADAPTER, OTHER, PROMPT, decoded, in_ranks, run

from tightrope.backends.hf.backend import HFBackend
from tightrope.backends.hf.ranks.gather import GroupGather
from tightrope.kernels import dispatch


@pytest.fixture(scope="module", params=[2, 3])
def several(request: pytest.FixtureRequest) -> Iterator[HFBackend]:
    """Of the two KV heads three ranks have two; their heads and columns are uneven."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(dispatch, "can_gather", lambda: False)  # As where the kernels are not built.
        backend = in_ranks(request.param)
    with closing(backend):
        yield backend


@pytest.fixture(scope="module")
def one(several: HFBackend) -> Iterator[HFBackend]:
    """A fresh one for each, so that books have gone through the same."""
    with closing(in_ranks(1)) as backend:
        yield backend


def test_ranks_meet_by_gloo(several: HFBackend):
    gather = several._part.own.model.current.gather

    assert isinstance(gather, GroupGather)
    assert torch.distributed.get_backend() == "gloo"
    assert torch.distributed.get_world_size() == gather.share.count


def test_prompts_and_steps_side_by_side_give_the_logits_of_one_rank(one: HFBackend, several: HFBackend):
    expected, found = (decoded(backend, (PROMPT, OTHER), 3) for backend in (one, several))

    assert torch.equal(found, expected)


def test_adapters_give_the_logits_of_one_rank(one: HFBackend, several: HFBackend):
    for backend in (one, several):
        backend.adapters.prepare("later", ADAPTER)()
    expected, found = (run(backend, PROMPT, "later") for backend in (one, several))
    for backend in (one, several):
        backend.adapters.remove("later")

    assert torch.equal(found, expected)


def test_pages_read_from_one_rank_are_those_of_several(one: HFBackend, several: HFBackend):
    pages = []
    for backend in (one, several):
        decoded(backend, (PROMPT,), 1)
        pages.append(torch.from_numpy(backend.read_pages([0, 1], [])))

    assert torch.equal(*pages)
