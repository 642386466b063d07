"""torch.export and torch.compile take the model whole, with padding that is known later."""

import pytest
import torch

LENGTH = 12


@pytest.mark.parametrize("layout", ["mixed_model", "windowed_model"])
def test_an_exported_model_computes_the_same(layout, request, draw_ids) -> None:
    model, ids = request.getfixturevalue(layout), draw_ids(2, LENGTH)
    everything = torch.ones(2, LENGTH, dtype=torch.long)
    padded = everything.clone()
    padded[0, :5] = padded[1, 9:] = 0
    with torch.no_grad():
        program = torch.export.export(
            model, (ids,), {"attention_mask": everything, "use_cache": False}, strict=False
        )
        for mask in (everything, padded):
            found = program.module()(ids, attention_mask=mask, use_cache=False).logits
            wanted = model(ids, attention_mask=mask, use_cache=False).logits
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_documents_are_told_apart_in_an_exported_model(mixed_model, draw_ids) -> None:
    ids, one = draw_ids(1, LENGTH), torch.arange(LENGTH)[None]
    with torch.no_grad():
        program = torch.export.export(
            mixed_model, (ids,), {"position_ids": one, "use_cache": False}, strict=False
        )
        for positions in (one, one % 7):
            found = program.module()(ids, position_ids=positions, use_cache=False).logits
            wanted = mixed_model(ids, position_ids=positions, use_cache=False).logits
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_a_padded_model_compiles_whole(mixed_model, draw_ids, uncached) -> None:
    ids, mask = draw_ids(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :4] = 0
    compiled = torch.compile(mixed_model, backend="eager", fullgraph=True)
    wanted = uncached(mixed_model, ids, attention_mask=mask)
    torch.testing.assert_close(uncached(compiled, ids, attention_mask=mask), wanted)
