"""The product that begins a head: least squares, for the layer that it is made for."""

import pytest
import torch
from decode.heads import guided

from mambactl.data.pack import Batch
from mambactl.models.draft_head import shifted
from mambactl.train.draft_start import begun_head
from mambactl.train.head_objective import HeadObjective
from mambactl.train.held_out_drafts import HeldOutDrafts
from mambactl.train.predicted_input import RIDGE, input_map

LENGTH = 24


@pytest.fixture(scope="module")
def target(make_hybrid):
    return make_hybrid(["mamba2", "attention"], seed=3).eval()


def text(rows: int, seed: int, vocabulary: int) -> Batch:
    """Rows of two documents each."""
    ids = torch.randint(vocabulary, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))
    half = torch.arange(LENGTH // 2)
    positions = torch.cat([half, half]).repeat(rows, 1)
    numbers = torch.arange(2).repeat_interleave(LENGTH // 2).repeat(rows, 1).int()
    return Batch(ids, numbers, positions, positions > 0, torch.ones_like(positions > 0))


def unit(stream):
    return stream / stream.square().mean(-1, keepdim=True).sqrt()


@pytest.mark.parametrize("layer", [1, None])
@torch.no_grad()
def test_the_map_is_that_of_least_squares(target, layer) -> None:
    batches = [text(20, seed, target.config.vocab_size) for seed in range(2)]
    given, wanted = [], []
    for batch in batches:
        for row in batch.input_ids:
            for ids in row.split(LENGTH // 2):
                stream, context = target.model.enter(ids[None])
                streams = [stream]
                for block in target.model.layers:
                    streams.append(block(streams[-1], context, None))
                before = shifted(streams[-1], torch.zeros_like(stream[:, 0]))
                # all but the first token, which has no stream before it
                inputs = torch.cat([unit(before), unit(stream)], -1)[0, 1:]
                found = streams[-2 if layer == 1 else -1][0, 1:]
                size = found.square().mean(-1, keepdim=True).sqrt()
                given.append(inputs / size)
                wanted.append(found / size)
    given, wanted = torch.cat(given).double(), torch.cat(wanted).double()
    ridge = RIDGE * given.square().sum(0).mean()
    given = torch.cat([given, ridge.sqrt() * torch.eye(given.shape[1])])
    wanted = torch.cat([wanted, wanted.new_zeros(given.shape[1], wanted.shape[1])])
    best = torch.linalg.lstsq(given, wanted).solution.float().t()
    torch.testing.assert_close(input_map(target, layer, batches), best, rtol=1e-3, atol=1e-4)


def test_a_head_drafts_before_its_first_step(make_hybrid) -> None:
    """A token that follows mostly from the present one is known from the embedding alone."""
    target = guided(make_hybrid(["mamba2", "attention"], seed=3))
    size = target.config.vocab_size
    head = begun_head(target, torch.arange(size), False, [text(64, 0, size), text(64, 1, size)])
    objective = HeadObjective(head, target, 1, 1.0, 0.0)
    found = HeldOutDrafts(objective, [text(8, 9, size)], 1).measure()
    assert found["agreement"] > 0.5
