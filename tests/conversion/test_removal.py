"""KV heads ranked by what the teacher loses when they see a window alone."""

import pytest
import torch

from mambactl.checkpoint.load import load_lineage, load_model, load_tokenizer
from mambactl.commands.convert import plan, run
from mambactl.conversion import select_heads
from mambactl.conversion.choice import UNITS
from mambactl.conversion.gates import gate_worth
from mambactl.conversion.ranking import Instruments, score_of
from mambactl.conversion.removal import Removals, removal_forwards
from mambactl.data.sources import load_rows
from mambactl.evaluation.controls import windowed_attention
from mambactl.evaluation.facts import FACTS, fact_probe
from mambactl.evaluation.recall import kv_probe, measure_recall
from mambactl.models.key_ring import WindowSettings
from mambactl.options import ConvertConfig

WINDOW = WindowSettings(6, 2)
HEADS = UNITS["head"]


@pytest.fixture(scope="module")
def teacher(make_hybrid):
    """Three layers of two KV heads each."""
    return make_hybrid(["attention"] * 3, seed=1).requires_grad_(False)


@pytest.fixture(scope="module")
def needle(tiny_tokenizer, random_texts):
    return fact_probe(tiny_tokenizer, load_rows([str(random_texts)]), 128, 2, seed=0)


@pytest.fixture(scope="module")
def instruments(teacher, tiny_tokenizer, needle):
    return Instruments(teacher, [], [kv_probe(tiny_tokenizer, 90, 2, seed=0), needle], 1)


@torch.no_grad()
def text_kl(teacher, probe, lost) -> float:
    """KL to the teacher on the text around the needles, of the teacher with narrowed heads."""
    log_p = teacher(probe.input_ids, use_cache=False).logits.double().log_softmax(-1)
    with windowed_attention(teacher, lost, *(WINDOW.window, WINDOW.sinks)):
        log_q = teacher(probe.input_ids, use_cache=False).logits.double().log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1)[probe.spoken].mean())


def losses(teacher, probes, lost) -> list[float]:
    with windowed_attention(teacher, lost, *(WINDOW.window, WINDOW.sinks)):
        return [measure_recall(teacher, probe)["recall_loss"] for probe in probes]


@pytest.mark.parametrize("criterion", ["kl", "recall"])
def test_scores_are_those_of_the_teacher_under_a_window(
    teacher, instruments, needle, criterion, monkeypatch
) -> None:
    # three models at a time
    monkeypatch.setattr("mambactl.conversion.ranking.TOGETHER", 3)
    units = HEADS.of(teacher.config)
    assert [unit.name for unit in units] == ["0.0", "0.1", "1.0", "1.1", "2.0", "2.1"]
    found = Removals(instruments, units, WINDOW, criterion).run(2)
    whole = losses(teacher, instruments.probes.values(), {})
    missed = {}
    for unit, score in found.scores.items():
        lost = {unit.layer: unit.heads}
        assert score.kl == pytest.approx(text_kl(teacher, needle, lost), rel=1e-3)
        after = losses(teacher, instruments.probes.values(), lost)
        assert score.losses == pytest.approx(after, rel=1e-4)
        missed[unit] = [score.kl]
        if criterion == "recall":
            missed[unit] += [max(0, b - a) for a, b in zip(whole, after, strict=True)]
    totals = [sum(column) for column in zip(*missed.values(), strict=True)]
    shares = {u: [m / t for m, t in zip(missed[u], totals, strict=True)] for u in units}
    worth = {u: text / 2 + sum(answers) / 2 for u, (text, *answers) in shares.items()}
    assert found.ranking == sorted(units, key=lambda unit: -worth[unit])
    assert found.front[0].kl > found.front[6].kl == pytest.approx(0, abs=1e-6)
    # the hooks are gone
    assert score_of(list(teacher.model.layers), instruments).kl == pytest.approx(0, abs=1e-6)


def test_long_rows_are_read_for_the_heads_that_short_ones_miss(
    teacher, tiny_tokenizer, random_texts
) -> None:
    text = load_rows([str(random_texts)])
    probes = [fact_probe(tiny_tokenizer, text, length, 1, seed=0) for length in (112, 240)]
    units, read = HEADS.of(teacher.config), Instruments(teacher, [], probes, 1)
    found = Removals(read, units, WINDOW, "recall").run(2)
    whole = losses(teacher, probes, {})
    measured = 0
    for unit, score in found.scores.items():
        after = losses(teacher, probes, {unit.layer: unit.heads})
        assert score.losses[0] == pytest.approx(after[0], rel=1e-4)
        if score.losses[1] == pytest.approx(after[1], rel=1e-4):
            measured += 1
            texts = [text_kl(teacher, probe, {unit.layer: unit.heads}) for probe in probes]
            counts = [int(probe.spoken.sum()) for probe in probes]
            mean = sum(a * b for a, b in zip(texts, counts, strict=True)) / sum(counts)
            assert score.kl == pytest.approx(mean, rel=1e-3)
        else:
            assert score.losses[1] == pytest.approx(whole[1], rel=1e-4)
    assert measured == 2


def test_exchanges_only_help(teacher, instruments) -> None:
    units = HEADS.of(teacher.config)
    after = Removals(instruments, units, WINDOW, "recall").run(3)
    before = Removals(instruments, units, WINDOW, "recall", exchanges=0).run(3)
    assert before.exchanged == 0 and set(before.kept) == set(before.ranking[:3])
    removals = Removals(instruments, units, WINDOW, "recall")
    costs = [
        removals._cost(found.front[3], found.front[6], found.front[0]) for found in (before, after)
    ]
    assert costs[1] <= costs[0]
    assert (after.exchanged > 0) == (set(after.kept) != set(before.kept))
    assert removals._cost(after.front[6], after.front[6], after.front[0]) == 0


def test_what_gates_say_of_text_takes_the_place_of_its_kl(teacher, instruments) -> None:
    units = HEADS.of(teacher.config)
    # against the order of the layers, and above all that answers say
    said = {unit: 100.0**unit.layer + unit.heads[0] for unit in units}
    found = Removals(instruments, units, WINDOW, "kl", said, exchanges=0).run(2)
    assert found.ranking == sorted(units, key=said.__getitem__, reverse=True)


def test_a_needle_stands_before_the_window_and_its_answer_at_the_end(
    needle, tiny_tokenizer, random_texts
) -> None:
    assert needle.input_ids.shape == (2, 128)
    for row in range(2):
        answer = needle.input_ids[row][needle.answers[row]].tolist()
        wanted = tiny_tokenizer(FACTS[row].ends.strip())["input_ids"]
        assert answer == wanted and bool(needle.answers[row, -1])
        text = needle.input_ids[row][needle.text[row]].tolist()
        sentence = tiny_tokenizer(FACTS[row].sentence)["input_ids"]
        starts = [i for i in range(len(text)) if text[i : i + len(sentence)] == sentence]
        assert len(starts) == 1 and starts[0] < 0.6 * len(text)
        assert not (needle.text[row] & needle.answers[row]).any()
    rows = load_rows([str(random_texts)])
    again = fact_probe(tiny_tokenizer, rows, 128, 2, seed=0)
    assert torch.equal(again.input_ids, needle.input_ids)


def test_from_the_shell_without_data(tiny_llama_dir, tmp_path, capsys) -> None:
    config = ConvertConfig(by="head", select="recall", window=6, sinks=2, ratio=0.6, device="cpu")
    planned = plan(config, str(tiny_llama_dir))
    assert (planned["kept"], planned["kept_heads"], planned["layers"]) == (3, None, None)
    assert planned["selection"]["forwards"] == removal_forwards(8, 3)
    result = run(config, str(tiny_llama_dir), tmp_path / "t.st")
    found = result.metrics["selection"]
    assert found["form"] == {"window": 6, "sinks": 2} and found["measure"] == "removal"
    assert found["recall_probe"] == "kv-256,mqar-256,needle-256,needle-1024"
    assert sorted(found["ranking"]) == [f"{i}.{h}" for i in range(4) for h in range(2)]
    assert load_lineage(result.path)["metrics"]["selection"] == found
    assert "untrained, by the heads that stay" in capsys.readouterr().err
    # keys and values of a head of 16 in fp32
    assert [p["kv_bytes_per_token"] for p in found["front"]] == [0, 128, 3 * 128, 8 * 128]
    # what is written is what was measured
    text = load_rows(["recipes/data/quickstart.jsonl"])
    tokenizer = load_tokenizer(str(tiny_llama_dir))
    models = [load_model(path, dtype=torch.float32) for path in (str(tiny_llama_dir), result.path)]
    total = count = 0
    for length in (256, 1024):
        probe = fact_probe(tokenizer, text, length, 1, seed=0)
        with torch.no_grad():
            p, q = (m(probe.input_ids, use_cache=False).logits.log_softmax(-1) for m in models)
        total += float((p.exp() * (p - q)).sum(-1)[probe.spoken].sum())
        count += int(probe.spoken.sum())
    assert found["tokens"] == count
    (chosen,) = [point for point in found["front"] if point["kept"] == 3]
    assert chosen["kl"] == pytest.approx(total / count, rel=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_trains_gates_and_asks_more(tiny_llama_dir, tmp_path, monkeypatch) -> None:
    """Gates say what text needs there, and pairs are asked at the long rows too."""
    worth = []

    def trained(*arguments):
        worth.append(gate_worth(*arguments))
        return worth[-1]

    monkeypatch.setattr(select_heads, "gate_worth", trained)
    config = ConvertConfig(by="head", select="recall", window=6, sinks=2, ratio=0.6, device="cuda")
    found = run(config, str(tiny_llama_dir), tmp_path / "t.st").metrics["selection"]
    assert found["text"] == "gates"
    assert found["recall_probe"] == "kv-256,mqar-256,kv-1024,mqar-1024,needle-256,needle-1024"
    assert {unit.name for unit in worth[0]} == set(found["ranking"]) and len(found["ranking"]) == 8
    # trained: neither all open nor all shut, and not all alike
    assert 0 < min(worth[0].values()) < max(worth[0].values()) < 1
