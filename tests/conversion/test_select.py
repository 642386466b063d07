"""`convert --select` and `--mixers-from`: what is measured, chosen, taken, recorded and refused."""

import json
from pathlib import Path

import pytest
import torch
from conftest import write_sentences

from mambactl.checkpoint.load import load_lineage, load_model, open_checkpoint
from mambactl.commands import convert
from mambactl.commands.convert import plan, run
from mambactl.conversion import select
from mambactl.errors import UsageError
from mambactl.options import ConvertConfig

LENGTH = 64
WINDOW = {"window": 4, "sinks": 1}
# keys and values of one token in one attention layer of the tiny Llama: 2 x 2 heads x 16 x fp32
LAYER_BYTES = 2 * 2 * 16 * 4


@pytest.fixture(scope="module")
def other_text(tmp_path_factory) -> str:
    return write_sentences(tmp_path_factory.mktemp("text") / "other.jsonl", 1, 30)


@pytest.fixture(scope="module")
def aligned(llama, text, tmp_path_factory) -> str:
    """Every layer replaced, its mixers fitted."""
    out = tmp_path_factory.mktemp("aligned") / "all.st"
    run(config(ratio=1, calibrate=[text]), llama, out)
    return str(out)


@pytest.fixture(scope="module")
def aligned_windows(llama, text, tmp_path_factory) -> str:
    """The same beside windows."""
    out = tmp_path_factory.mktemp("aligned") / "windows.st"
    run(config(ratio=1, calibrate=[text], **WINDOW), llama, out)
    return str(out)


def config(**fields) -> ConvertConfig:
    usual = {"by": "layer", "select_tokens": 256}
    return ConvertConfig(device="cpu", max_length=LENGTH, **usual | fields)


def tensors(path: str | Path) -> dict[str, torch.Tensor]:
    with open_checkpoint(str(path)) as reader:
        return {name: reader.get(name).clone() for name in reader.names()}


@torch.no_grad()
def kl_on(batches, teacher: str, student: str) -> float:
    models = [load_model(path, dtype=torch.float32) for path in (teacher, student)]
    total = count = 0
    for batch in batches:
        keywords = {"position_ids": batch.position_ids, "seq_idx": batch.seq_idx}
        p, q = (
            m(batch.input_ids, use_cache=False, **keywords).logits.double().log_softmax(-1)
            for m in models
        )
        counted = batch.loss_mask[:, 1:]
        total += float((p.exp() * (p - q)).sum(-1)[:, :-1][counted].sum())
        count += int(counted.sum())
    return total / count


def test_a_swap_scores_as_the_model_with_that_layer_converted(llama, text, other_text, tmp_path):
    # no more than a selection fits on, so that both fits are of the same text
    fit = {"calibrate": [text], "calibrate_tokens": 1024}
    chosen = config(ratio=0.75, select="kl", select_data=[other_text], **fit)
    result = run(chosen, llama, tmp_path / "t.st")
    found = result.metrics["selection"]
    scores = {entry["layer"]: entry["kl"] for entry in found["scores"]}
    held_out = select.read_texts(chosen, llama).held_out
    assert found["tokens"] == sum(int(batch.loss_mask[:, 1:].sum()) for batch in held_out)
    for layer in range(4):
        kept = [index for index in range(4) if index != layer]
        out = tmp_path / f"without-{layer}.st"
        run(config(keep_attention=kept, **fit), llama, out)
        assert scores[layer] == pytest.approx(kl_on(held_out, llama, str(out)), rel=2e-3)
    # the layer that is missed most stays, and the ranking says so
    assert result.metrics["attention_layers"] == [max(scores, key=scores.__getitem__)]
    assert found["ranking"] == sorted(scores, key=scores.__getitem__)
    assert load_lineage(result.path)["metrics"]["selection"] == found
    assert load_model(result.path).config.mixers.count("attention") == 1


def test_held_out_rows_are_not_fitted_on(llama, text):
    texts = select.read_texts(config(select="kl", calibrate=[text]), llama)
    fit, held_out = (
        {tuple(row.tolist()) for batch in batches for row in batch.input_ids}
        for batches in (texts.fit, texts.held_out)
    )
    assert len(held_out) == 256 // LENGTH and fit and not fit & held_out
    whole = select.read_texts(config(calibrate=[text]), llama)
    assert whole.held_out == [] and len(whole.fit) >= len(texts.fit)


def test_without_text_for_the_fit_priors_are_ranked(llama, other_text, tmp_path):
    result = run(config(select="kl", select_data=[other_text]), llama, tmp_path / "t.st")
    found = result.metrics["selection"]
    assert set(found["data_sha256"]) == {"held_out"}
    assert sorted(found["ranking"]) == [0, 1, 2, 3]
    assert result.metrics["attention_layers"] == sorted(found["ranking"][2:])
    assert "calibration_error" not in result.metrics


def test_recall_is_measured_beside_kl(llama, text, tmp_path, capsys):
    chosen = config(select="recall", calibrate=[text], select_recall=128)
    result = run(chosen, llama, tmp_path / "t.st")
    found = result.metrics["selection"]
    assert found["recall_probe"] == "kv-128"
    assert all(entry["recall_loss"] > 0 for entry in found["scores"])
    assert "recall loss" in capsys.readouterr().err
    assert len(result.metrics["attention_layers"]) == 2


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1])
def test_mixers_are_taken_bit_for_bit_and_nothing_else(llama, aligned, ratio, tmp_path):
    # a rest that was trained as well stays behind
    result = run(config(ratio=ratio, mixers_from=aligned), llama, tmp_path / "t.st")
    made, source, ready = tensors(tmp_path / "t.st"), tensors(llama), tensors(aligned)
    replaced = result.metrics["replaced_layers"]
    assert replaced == {0.25: [0], 0.5: [0, 2], 1: [0, 1, 2, 3]}[ratio]
    for name, tensor in made.items():
        origin = ready if ".mamba." in name else source
        assert torch.equal(tensor, origin[name]), name
    assert {int(name.split(".")[2]) for name in made if ".mamba." in name} == set(replaced)


def test_a_rest_that_differs_is_said_and_left(llama, aligned, tmp_path, capsys):
    from mambactl.checkpoint.save import save_model
    from mambactl.checkpoint.side_files import read_side_files

    model = load_model(aligned)
    with torch.no_grad():
        model.model.layers[2].input_layernorm.weight.mul_(1.1)
    save_model(model, tmp_path / "moved", read_side_files(Path(llama)), None)
    run(config(mixers_from=str(tmp_path / "moved")), llama, tmp_path / "t.st")
    err = capsys.readouterr().err
    assert "layer 2 of" in err and "layer 0 of" not in err
    name = "model.layers.2.input_layernorm.weight"
    assert torch.equal(tensors(tmp_path / "t.st")[name], tensors(llama)[name])


@pytest.mark.parametrize(
    ("criterion", "form", "source"),
    [("kl", {}, "aligned"), ("recall", {}, "aligned"), ("kl", WINDOW, "aligned_windows")],
)
def test_attention_is_added_to_aligned_mixers(
    llama, other_text, criterion, form, source, tmp_path, request
):
    aligned = request.getfixturevalue(source)
    measured = {"select_data": [other_text], "select_recall": 128}
    chosen = config(select=criterion, mixers_from=aligned, **measured, **form)
    result = run(chosen, llama, tmp_path / "t.st")
    found = result.metrics["selection"]
    front = found["front"]
    assert [point["kv_bytes_per_token"] for point in front] == [0, LAYER_BYTES, 2 * LAYER_BYTES]
    added = [point["layer"] for point in front[1:]]
    assert result.metrics["attention_layers"] == sorted(added)
    assert found["ranking"][:1:-1] == added and sorted(found["ranking"]) == [0, 1, 2, 3]
    held_out = select.read_texts(chosen, llama).held_out
    assert front[0]["kl"] == pytest.approx(kl_on(held_out, llama, aligned), rel=1e-3)
    assert front[-1]["kl"] == pytest.approx(kl_on(held_out, llama, result.path), rel=1e-3)
    # what is written is what was measured
    made, ready = tensors(result.path), tensors(aligned)
    assert all(torch.equal(made[name], ready[name]) for name in made if ".mamba." in name)


@pytest.mark.parametrize("select", ["uniform", "kl"])
@pytest.mark.parametrize(("budget", "layers"), [(0, 0), (2 * LAYER_BYTES + 5, 2), (10**9, 4)])
def test_a_budget_for_the_cache(llama, aligned, other_text, select, budget, layers, tmp_path):
    data = [] if select == "uniform" else [other_text]
    chosen = config(kv_budget=budget, select=select, select_data=data, mixers_from=aligned)
    result = run(chosen, llama, tmp_path / "t.st")
    assert len(result.metrics["attention_layers"]) == layers


def test_the_plan_counts_the_forwards(llama, aligned, text, other_text):
    single = plan(config(select="kl", calibrate=[text]), llama)
    assert (single["kept"], single["selection"]["forwards"]) == (2, 4)
    assert (single["selection"]["documents"], single["layers"]) == (60, None)
    added = plan(config(select="kl", mixers_from=aligned, select_data=[other_text]), llama)
    assert added["selection"]["forwards"] == 4 + 3
    assert json.dumps(added) and plan(config(), llama)["replaced"] == [0, 2]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"select": "kl"}, "--select kl measures on text and has none"),
        ({"select": "kl", "select_data": ["text"], "keep_attention": [1]}, "nothing to select"),
        ({"select_data": ["text"]}, "--select-data is for --select"),
        ({"mixers_from": "aligned", "calibrate": ["text"]}, "--mixers-from brings its own"),
        ({"mixers_from": "half", "ratio": 1}, r"no mamba2 mixer in the layers \[1, 3\]"),
        ({"mixers_from": "aligned", "mixer": "mamba1"}, "no mamba1 mixer in the layers"),
        ({"select": "kl", "calibrate": ["short"]}, "too few to hold some out"),
    ],
)
def test_what_is_refused_before_anything_is_measured(
    llama, aligned, text, fields, message, tmp_path, monkeypatch
):
    monkeypatch.setattr(select, "load_model", lambda *_: pytest.fail("a model was loaded"))
    half = tmp_path / "half.st"
    run(config(), llama, half)
    named = {
        "text": text,
        "short": write_sentences(tmp_path / "short.jsonl", 0, 2),
        "aligned": aligned,
        "half": str(half),
    }

    def resolve(value):
        return [named.get(v, v) for v in value] if isinstance(value, list) else named.get(value)

    known = {"select_data", "calibrate", "mixers_from"}
    fields = {k: resolve(v) if k in known else v for k, v in fields.items()}
    with pytest.raises(UsageError, match=message):
        run(config(**fields), llama, tmp_path / "t.st")
    assert not (tmp_path / "t.st").exists()


def test_mixers_of_another_model_are_refused(llama, aligned, make_hybrid, tmp_path):
    from mambactl.checkpoint.save import save_model
    from mambactl.checkpoint.side_files import read_side_files

    wide = make_hybrid(["mamba2"] * 4, num_key_value_heads=4)
    save_model(wide, tmp_path / "wide", read_side_files(Path(llama)), None)
    with pytest.raises(UsageError, match="is another model: it differs in num_key_value_heads"):
        run(config(mixers_from=str(tmp_path / "wide")), llama, tmp_path / "t.st")


def test_layers_that_a_hybrid_has_must_be_of_the_same_form(llama, aligned, tmp_path):
    half = tmp_path / "half.st"
    run(config(init="reference"), llama, half)
    with pytest.raises(UsageError, match="another form than .*all.st"):
        run(config(ratio=1, mixers_from=aligned), str(half), tmp_path / "t.st")


def test_an_output_that_exists_is_refused_before_measuring(llama, text, tmp_path, monkeypatch):
    from mambactl.errors import OutputError

    (tmp_path / "t.st").write_text("mine")
    monkeypatch.setattr(convert, "choose", lambda *_: pytest.fail("measured before it looked"))
    with pytest.raises(OutputError, match="exists"):
        run(config(select="kl", calibrate=[text]), llama, tmp_path / "t.st")
