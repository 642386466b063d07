"""Fidelity numbers against a dense fp64 oracle, and the edges of cutting text into rows."""

import copy
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from mambactl.errors import ModelError, UsageError
from mambactl.evaluation.fidelity import MEANS, Variant, compare, cut_rows, fidelity

MIXERS = ["mamba2", "attention", "mamba1", "attention"]


@pytest.fixture(scope="module")
def pair(make_hybrid):
    teacher = make_hybrid(["attention"] * 4, seed=1)
    student = make_hybrid(MIXERS, seed=1)
    # a student like its teacher, so that agreement is neither 0 nor 1
    shared = dict(teacher.named_parameters())
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if name in shared:
                parameter.copy_(shared[name])
        for name, parameter in (*student.named_parameters(), *shared.items()):
            if name.endswith(("o_proj.weight", "out_proj.weight")):
                parameter.mul_(0.2)
    return student, teacher


@pytest.fixture(scope="module")
def documents():
    generator = torch.Generator().manual_seed(3)
    lengths = (300, 5, 70, 1, 65, 129)
    return [torch.randint(97, (n,), generator=generator).tolist() for n in lengths]


def dense_oracle(student, teacher, documents, max_length):
    """Every number from whole unpadded rows and dense fp64 logits."""
    student, teacher = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
    columns = {name: [] for name in (*MEANS, "place")}
    for document in documents:
        for start in range(0, len(document), max_length):
            ids = torch.tensor([document[start : start + max_length]])
            if ids.shape[1] < 2:
                continue
            with torch.no_grad():
                q = student(ids).logits[0, :-1].softmax(-1)
                p = teacher(ids).logits[0, :-1].softmax(-1)
            target = ids[0, 1:, None]
            columns["kl"].append((p * (p / q).log()).sum(-1))
            columns["reverse_kl"].append((q * (q / p).log()).sum(-1))
            best = [each.argsort(-1, descending=True)[:, :5] for each in (p, q)]
            shared = [
                len(set(a) & set(b)) / 5 for a, b in zip(*(t.tolist() for t in best), strict=True)
            ]
            columns["top5"].append(torch.tensor(shared))
            columns["acceptance"].append(1 - (p - q).abs().sum(-1) / 2)
            columns["agreement"].append((p.argmax(-1) == q.argmax(-1)).double())
            columns["ce"].append(-q.gather(-1, target).log()[:, 0])
            columns["teacher_ce"].append(-p.gather(-1, target).log()[:, 0])
            columns["place"].append(torch.arange(ids.shape[1] - 1))
    return {name: torch.cat(parts).numpy() for name, parts in columns.items()}


@pytest.mark.parametrize("batch_size", [1, 4])
def test_numbers_equal_the_dense_oracle(pair, documents, batch_size):
    oracle = dense_oracle(*pair, documents, max_length=128)
    # 7 tokens of 97 words a chunk: chunks end inside rows
    result = fidelity(
        *pair, documents, max_length=128, batch_size=batch_size, chunk_elements=7 * 97
    )
    for name in ("kl", "reverse_kl", "acceptance", "ce", "teacher_ce"):
        assert result[name] == pytest.approx(oracle[name].mean(), rel=2e-5), name
    for name in ("agreement", "top5"):
        assert result[name] == pytest.approx(oracle[name].mean(), abs=1e-7)
    assert 0.05 < result["agreement"] < 0.95
    assert result["kl_p95"] == pytest.approx(np.quantile(oracle["kl"], 0.95), rel=2e-5)
    assert result["perplexity"] == pytest.approx(np.exp(oracle["ce"].mean()), rel=1e-4)
    ratio = np.exp(oracle["ce"].mean() - oracle["teacher_ce"].mean())
    assert result["perplexity_ratio"] == pytest.approx(ratio, rel=1e-4)
    assert result["tokens"] == len(oracle["kl"])
    for label, inside in {
        "0-63": oracle["place"] < 64,
        "64-255": oracle["place"] >= 64,
    }.items():
        bucket = result["by_position"][label]
        assert bucket["tokens"] == inside.sum()
        assert bucket["kl"] == pytest.approx(oracle["kl"][inside].mean(), rel=2e-5)
    assert set(result["by_position"]) == {"0-63", "64-255"}


def test_a_model_equals_itself_exactly(pair, documents):
    student = pair[0]
    for teacher in (student, copy.deepcopy(student)):
        result = fidelity(student, teacher, documents, max_length=64, batch_size=3)
        assert result["kl"] == result["kl_p95"] == 0
        assert result["agreement"] == result["perplexity_ratio"] == 1
        assert result["acceptance"] == pytest.approx(1, abs=1e-6)


def test_variants_share_rows_and_teacher(pair, documents):
    """Each equals what it measures alone, and is as its context makes it."""
    student, teacher = pair

    @contextmanager
    def silent():
        handle = student.model.layers[0].mixer.register_forward_hook(lambda *a: a[2] * 0)
        try:
            yield
        finally:
            handle.remove()

    variants = {"a": Variant(student), "b": Variant(student, silent), "c": Variant(teacher)}
    found = compare(variants, teacher, documents, 64, 3)
    assert found["a"] == fidelity(student, teacher, documents, 64, 3)
    assert found["b"]["kl"] != found["a"]["kl"]
    assert found["c"]["kl"] == 0 and found["c"]["top5"] == 1


def test_long_rows_have_their_own_buckets(make_hybrid):
    model = make_hybrid(["mamba2"])
    draw = torch.Generator().manual_seed(0)
    document = torch.randint(97, (4200,), generator=draw).tolist()
    buckets = fidelity(model, model, [document], max_length=8192)["by_position"]
    tokens = {label: bucket["tokens"] for label, bucket in buckets.items()}
    assert tokens == {
        "0-63": 64, "64-255": 192, "256-1023": 768, "1024-4095": 3072, "4096+": 103,
    }  # fmt: skip


def test_rows_cover_the_documents_without_rests_of_one():
    rows = cut_rows([range(10), range(4), [7], range(9)], max_length=4)
    assert [len(row) for row in rows] == [4, 4, 4, 4, 4, 2]
    assert rows[-1].tolist() == [8, 9]


def test_no_token_to_predict_is_an_error(pair):
    with pytest.raises(UsageError, match="nothing to predict"):
        fidelity(*pair, [[1], []])


def test_other_vocabulary_is_an_error(pair, make_hybrid):
    other = make_hybrid(["attention"], vocab_size=50)
    with pytest.raises(ModelError, match="97 tokens and the teacher one of 50"):
        fidelity(pair[0], other, [[1, 2, 3]])


def test_calibration_is_that_of_dense_probabilities(pair, documents):
    student, teacher = pair
    columns = {"confidence": [], "right": [], "guided": []}
    for document in documents:
        if len(document) > 1:
            ids = torch.tensor([document])
            with torch.no_grad():
                q, p = (model(ids).logits[0, :-1].softmax(-1) for model in (student, teacher))
            best = q.argmax(-1, keepdim=True)
            columns["confidence"].append(q.gather(-1, best)[:, 0])
            columns["right"].append((best[:, 0] == ids[0, 1:]).float())
            columns["guided"].append(p.gather(-1, best)[:, 0])
    confidence, right, guided = (torch.cat(parts).double().numpy() for parts in columns.values())
    result = fidelity(student, teacher, documents, max_length=512, batch_size=3)
    edges = np.arange(1, 15) / 15
    for name, wanted in (("ece", right), ("ece_to_teacher", guided)):
        gaps = [
            (confidence - wanted)[np.digitize(confidence, edges) == place].sum()
            for place in range(15)
        ]
        error = np.abs(gaps).sum() / len(confidence)
        assert result[name] == pytest.approx(error, abs=1e-4), name
        assert error > 0.01
