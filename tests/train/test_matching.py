"""The loss of `sft`, in the trainer's own steps: packed documents count as they do apart."""

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from mambactl.data.format import Example
from mambactl.data.pack import collate, pack
from mambactl.train.cached_teacher import Drawing, TeacherCache, digests, draw_batch, write_shard

# kl and ce weights
WEIGHTS = {"ce": (0.0, 0.7), "kl": (1.0, 0.0), "both": (0.5, 0.7)}


@pytest.fixture(scope="module")
def documents():
    """Eight documents of which the second half is learned."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(6, 20, 8)
    return [
        Example(draw.integers(3, 97, n).astype(np.int32), np.arange(n) >= n // 2) for n in lengths
    ]


@pytest.fixture
def make_trainer(pair, tiny_tokenizer, tmp_path):
    """make_trainer(rows, kl_weight, ce_weight, cache=None) -> a trainer of the tiny student."""
    from trl import SFTConfig

    from mambactl.train.matching import MatchingTrainer, as_dataset, cached, collate_features

    def make(rows, kl_weight, ce_weight, cache=None):
        student, teacher = pair
        arguments = SFTConfig(
            output_dir=str(tmp_path / "trainer"), per_device_train_batch_size=len(rows),
            max_length=64, use_cpu=True, bf16=False, report_to="none", max_steps=1,
            dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False,
            gradient_checkpointing=False,
        )  # fmt: skip
        return MatchingTrainer(
            student.train(),
            arguments,
            teacher=teacher if kl_weight and cache is None else None,
            kl_weight=kl_weight,
            ce_weight=ce_weight,
            amp=None,
            data_collator=collate_features if cache is None else cached(cache),
            train_dataset=as_dataset(rows),
            processing_class=tiny_tokenizer,
        )

    return make


def step(trainer):
    """Loss and gradients of one step of the trainer over all of its rows."""
    feed = iter(trainer.get_train_dataloader())
    samples, items = trainer.get_batch_samples(feed, 1, trainer.args.device)
    trainer.model.zero_grad()
    loss = trainer.training_step(trainer.model, samples[0], items)
    return float(loss), {name: p.grad.clone() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("name", WEIGHTS)
def test_packed_rows_have_the_loss_and_gradients_of_rows_apart(make_trainer, documents, name):
    packed, apart = pack(documents, 48), pack(documents, 48, packing=False)
    assert len(packed) < len(apart) == 8
    (loss, grads), (wanted, expected) = (
        step(make_trainer(r, *WEIGHTS[name])) for r in (packed, apart)
    )
    assert loss == pytest.approx(wanted, rel=1e-5)
    for parameter, grad in grads.items():
        torch.testing.assert_close(grad, expected[parameter], rtol=2e-4, atol=2e-6, msg=parameter)


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_loss_is_the_mean_over_learned_tokens(make_trainer, pair, documents, name):
    kl_weight, ce_weight = WEIGHTS[name]
    loss, _ = step(make_trainer(pack(documents, 48), kl_weight, ce_weight))
    student, teacher = pair
    total, count = 0.0, 0
    with torch.no_grad():
        for ids, mask in documents:
            given = torch.from_numpy(ids).long()[None]
            log_q, log_p = (
                m(given).logits[0, :-1].double().log_softmax(-1) for m in (student, teacher)
            )
            ce = -log_q.gather(-1, given[0, 1:, None])[:, 0]
            kl = (log_p.exp() * (log_p - log_q)).sum(-1)
            learned = torch.from_numpy(mask[1:])
            total += float((kl_weight * kl + ce_weight * ce)[learned].sum())
            count += int(learned.sum())
    assert loss == pytest.approx(total / count, rel=1e-4)


def test_nothing_is_read_between_the_forward_and_the_backward_pass(make_trainer, documents):
    """On a GPU every number that is read waits for all that was launched."""
    trainer = make_trainer(pack(documents, 48), 1.0, 0.5)
    samples, items = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, "cpu")
    with ReadsCounted() as reads:
        loss = trainer.compute_loss(trainer.model, samples[0], num_items_in_batch=items)
    assert reads.count == 0
    found = {}
    trainer.log(found)
    assert {type(found[name]) for name in ("train_kl", "train_ce")} == {float}
    assert found["train_kl"] + 0.5 * found["train_ce"] == pytest.approx(
        float(loss.detach()), rel=1e-5
    )


class ReadsCounted(TorchFunctionMode):
    """A count of the numbers that went from tensors to Python."""

    WAYS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += getattr(func, "__name__", "") in self.WAYS
        return func(*args, **(kwargs or {}))


def test_a_cache_stands_for_the_teacher(make_trainer, pair, documents, tmp_path):
    rows = pack(documents, 48)
    batch = collate(rows)
    keys = digests(batch)
    drawn = draw_batch(pair[1], batch, keys, Drawing(4000), None)
    write_shard(tmp_path / "samples-00000.safetensors", keys, drawn, 97, weighted=False)
    (loss, grads), (wanted, expected) = (
        step(make_trainer(rows, 0.5, 0.7, cache)) for cache in (TeacherCache(tmp_path, 97), None)
    )
    # the estimate is of 4000 draws per token
    assert loss == pytest.approx(wanted, rel=0.02)
    name = "model.layers.0.mamba.in_proj.weight"
    far = (grads[name] - expected[name]).norm() / expected[name].norm()
    assert 0 < far < 0.1
