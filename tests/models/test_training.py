"""Loss, gradients and gradient checkpointing."""

import pytest
import torch
import torch.nn.functional as F

from mambactl.models.transformers_names import recompute_activations


def gradients(model, **inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(any_model, draw_ids, reentrant) -> None:
    ids = draw_ids(2, 40)
    seq_idx = (torch.arange(40) >= 17).long().expand(2, 40)
    any_model.train()
    inputs = {"input_ids": ids, "labels": ids, "seq_idx": seq_idx}
    loss, plain = gradients(any_model, **inputs)
    recompute_activations(any_model, {"use_reentrant": reentrant})
    any_model.enable_input_require_grads()
    calls = []
    any_model.model.layers[0].mixer.register_forward_pre_hook(lambda *_: calls.append(1))
    again, checkpointed = gradients(any_model, **inputs)
    assert len(calls) == 2  # once more for the backward pass
    assert torch.equal(loss, again)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-7)
        assert gradient.abs().max() > 0, name


def test_loss_is_the_mean_over_learned_tokens(mixed_model, draw_ids, uncached) -> None:
    ids = draw_ids(2, 20)
    labels = ids.masked_fill(
        torch.rand(2, 20, generator=torch.Generator().manual_seed(0)) < 0.5, -100
    )
    with torch.no_grad():
        loss = mixed_model(ids, labels=labels).loss
        summed = mixed_model(ids, labels=labels, num_items_in_batch=torch.tensor(10)).loss
    logits, targets = uncached(mixed_model, ids)[:, :-1], labels[:, 1:]
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    learned = (targets != -100).sum()
    torch.testing.assert_close(loss, expected.sum() / learned)
    torch.testing.assert_close(summed, expected.sum() / 10)


def test_training_makes_no_cache(mixed_model, draw_ids) -> None:
    assert mixed_model.train()(draw_ids(1, 5)).past_key_values is None
    assert mixed_model.eval()(draw_ids(1, 5)).past_key_values is not None


def test_a_ragged_batch_learns_what_its_rows_learn_alone(mixed_model, draw_ids) -> None:
    ids, mask = draw_ids(2, 24), torch.ones(2, 24, dtype=torch.long)
    mask[0, :9] = 0
    mixed_model.train()
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 9] = -100  # padding would predict it; alone, nothing does
    together = gradients(
        mixed_model, input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=37
    )
    alone = [
        gradients(mixed_model, input_ids=part, labels=part, num_items_in_batch=37)
        for part in (ids[:1, 9:], ids[1:])
    ]
    torch.testing.assert_close(together[0], alone[0][0] + alone[1][0])
    for name, gradient in together[1].items():
        expected = alone[0][1][name] + alone[1][1][name]
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)
