"""Rankings of heads in the package: whose they are, when they count, how one is made."""

import json
from pathlib import Path

import pytest
import torch
from checkpoint.test_gguf_reader import tiny_llama, write_gguf

from mambactl.checkpoint.load import load_lineage, load_model, open_strict
from mambactl.checkpoint.save import save_model
from mambactl.checkpoint.side_files import read_side_files
from mambactl.commands.convert import plan, run
from mambactl.conversion import shipped
from mambactl.conversion.shipped import ranking_from, ranking_of, record, shipped_rankings, written
from mambactl.errors import UsageError
from mambactl.options import ConvertConfig
from tests.performance import ranking as script

# most needed first: no order that a rule would give
ORDER = ["3.1", "0.0", "2.1", "0.1", "3.0", "1.0", "1.1", "2.0"]
FORM = {"window": 6, "sinks": 2}


@pytest.fixture(scope="module")
def llama(tiny_llama_dir) -> str:
    return str(tiny_llama_dir)


@pytest.fixture
def shelf(tmp_path, monkeypatch) -> Path:
    """The folder of rankings that the package has, without any."""
    folder = tmp_path / "package" / shipped.FOLDER
    folder.mkdir(parents=True)
    monkeypatch.setattr(shipped, "recipe_folder", lambda: folder.parent)
    return folder


@pytest.fixture
def known(shelf, llama) -> None:
    """A ranking of the tiny Llama."""
    reader, adapted = open_strict(llama)
    with reader:
        made = record("tiny", reader, adapted, {"form": FORM, "ranking": ORDER}, {"by": "hand"})
    (shelf / "tiny.json").write_text(written(made))


def convert(llama: str, out: Path, **fields) -> dict:
    return run(ConvertConfig(device="cpu", **fields), llama, out).metrics


def test_a_known_teacher_keeps_the_heads_that_it_needs(known, llama, tmp_path, capsys) -> None:
    for ratio, kept in ((0.75, "0.0,3.1"), (0.5, "0.0,0.1,2.1,3.1")):
        metrics = convert(llama, tmp_path / f"{ratio}.st", ratio=ratio, **FORM)
        assert metrics["kept_heads"] == kept
        assert metrics["selection"] == {
            "select": "shipped", "model": "tiny", "form": FORM, "made": {"by": "hand"},
        }  # fmt: skip
        assert "by the ranking of tiny in the package" in capsys.readouterr().err
    assert plan(ConvertConfig(ratio=0.75, **FORM), llama)["kept_heads"] == "0.0,3.1"
    assert load_lineage(str(tmp_path / "0.5.st"))["metrics"]["selection"]["model"] == "tiny"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"window": 7, "sinks": 2}, "tiny holds for a window of 6 tokens and 2 sinks"),
        ({"window": 6, "sinks": 3}, "tiny holds for a window of 6 tokens and 2 sinks"),
        (FORM | {"keep_heads": "1.0,1.1,2.0,2.1"}, None),
        ({"form": "portable"}, None),
    ],
)
def test_it_counts_for_its_form_and_where_heads_are_open(
    known, llama, fields, said, tmp_path, capsys
) -> None:
    metrics = convert(llama, tmp_path / "t.st", **fields)
    err = capsys.readouterr().err
    assert "selection" not in metrics and "by the ranking" not in err
    if said is None:
        assert "better" not in err
        return
    assert metrics["kept_heads"] == "1.0,1.1,2.0,2.1"
    assert said in err
    words = f"--device cpu --window {fields['window']} --sinks {fields['sinks']} --select recall"
    assert f"mambactl convert {llama} {words}" in err


def test_an_unknown_teacher_is_told_what_would_do_better(shelf, llama, tmp_path, capsys) -> None:
    convert(llama, tmp_path / "t.st", ratio=0.75)
    err = capsys.readouterr().err
    assert "heads around 60% of the depth stay" in err
    assert f"mambactl convert {llama} --device cpu --ratio 0.75 --select recall" in err
    # nothing is open
    for ratio in (0, 1):
        convert(llama, tmp_path / f"{ratio}.st", ratio=ratio)
        assert "better" not in capsys.readouterr().err


def copy_of(llama: str, out: Path, change) -> str:
    """The tiny Llama with other keys' and values' projections."""
    model = load_model(llama)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("k_proj.weight", "v_proj.weight")):
                change(name, parameter)
    save_model(model, out, read_side_files(Path(llama)), None)
    return str(out)


def rounded(name: str, weight: torch.Tensor) -> None:
    """To 4 bits in blocks of 16, as a quantised copy has them."""
    blocks = weight.view(-1, 16)
    scale = blocks.abs().amax(1, keepdim=True) / 7
    blocks.copy_((blocks / scale).round() * scale)


def one_head_larger(name: str, weight: torch.Tensor) -> None:
    if name == "model.layers.2.self_attn.v_proj.weight":
        weight[:16].mul_(1.02)


@pytest.mark.parametrize(
    ("change", "is_known"),
    [
        (lambda name, weight: weight.copy_(weight.bfloat16()), True),
        (rounded, True),
        (one_head_larger, False),
        (lambda name, weight: weight.normal_(std=0.2), False),
    ],
    ids=["bfloat16", "4 bits", "one head", "other weights"],
)
def test_a_teacher_is_known_by_its_weights(known, llama, change, is_known, tmp_path) -> None:
    reader, adapted = open_strict(copy_of(llama, tmp_path / "copy", change))
    with reader:
        assert (ranking_of(reader, adapted) is not None) == is_known


def test_a_quantised_file_is_the_same_teacher(shelf, tmp_path) -> None:
    original = tiny_llama()
    original.save_pretrained(tmp_path / "llama")
    reader, adapted = open_strict(str(tmp_path / "llama"))
    order = {"form": FORM, "ranking": ["0.0", "0.1", "1.0", "1.1"]}
    with reader:
        (shelf / "tiny.json").write_text(written(record("tiny", reader, adapted, order, {})))
    packed = write_gguf(tmp_path / "q8.gguf", original, quantised=True)
    reader, adapted = open_strict(str(packed))
    with reader:
        assert ranking_of(reader, adapted).model == "tiny"


def test_other_shapes_are_not_read(known, save_llama, monkeypatch) -> None:
    monkeypatch.setattr(shipped, "_norms", lambda *_: pytest.fail("read weights"))
    reader, adapted = open_strict(save_llama(head_dim=8))
    with reader:
        assert ranking_of(reader, adapted) is None


def test_a_student_goes_on_with_the_ranking(known, llama, tmp_path) -> None:
    """The ranking counts for the layers that the student still has whole."""
    convert(llama, tmp_path / "most.st", keep_heads="0.0,0.1,1.0,1.1,3.0,3.1", **FORM)
    metrics = convert(str(tmp_path / "most.st"), tmp_path / "less.st", ratio=0.75)
    assert metrics["kept_heads"] == "0.0,3.1"


def test_ready_made_mixers_go_with_it(known, llama, tmp_path) -> None:
    convert(llama, tmp_path / "all.st", ratio=1, **FORM)
    taken = {"mixers_from": str(tmp_path / "all.st")}
    assert convert(llama, tmp_path / "t.st", **taken)["kept_heads"] == "0.0,0.1,2.1,3.1"
    convert(llama, tmp_path / "other.st", ratio=1, window=9)
    with pytest.raises(UsageError, match="a window of 9 tokens and 4 sinks"):
        convert(llama, tmp_path / "no.st", mixers_from=str(tmp_path / "other.st"), **FORM)


def test_a_selection_becomes_a_ranking(shelf, llama, tmp_path, capsys) -> None:
    measured = convert(llama, tmp_path / "s.st", select="kl", ratio=0.5, **FORM)["selection"]
    found = ranking_from(str(tmp_path / "s.st"), "tiny")
    assert (found.model, found.ranking) == ("tiny", measured["ranking"])
    assert found.form.model_dump() == FORM
    options = "--device cpu --form faithful --by head --select kl --window 6 --sinks 2"
    assert found.made["command"] == f"mambactl convert {llama} {options}"
    assert found.made["front"] == measured["front"] and "mambactl" in found.made["versions"]
    given = script.PARSER.parse_args([str(tmp_path / "s.st"), "--model", "tiny"])
    text = script.measure(given).text
    assert json.loads(text) == json.loads(written(found))
    (shelf / "tiny.json").write_text(text)
    assert shipped_rankings() == [found]
    kept = convert(llama, tmp_path / "t.st", ratio=0.75, **FORM)["kept_heads"]
    assert set(kept.split(",")) == set(measured["ranking"][:2])
    for student in ("t.st", "whole.st"):
        convert(llama, tmp_path / "whole.st", ratio=0) if student == "whole.st" else None
        with pytest.raises(UsageError, match="ranked KV heads"):
            ranking_from(str(tmp_path / student))


@pytest.mark.parametrize("found", shipped_rankings(), ids=lambda each: each.model)
def test_what_ships_ranks_every_head_once(found) -> None:
    layers, heads = found.num_hidden_layers, found.num_key_value_heads
    every = [f"{layer}.{head}" for layer in range(layers) for head in range(heads)]
    assert sorted(found.ranking) == sorted(every)
    assert set(found.norms) == set(shipped.PROJECTIONS)
    for rows in found.norms.values():
        assert [len(row) for row in rows] == [heads] * layers
        assert all(value > 0 for row in rows for value in row)
    assert found.made["command"]


@pytest.mark.weights
def test_the_quick_starts_teacher_is_known() -> None:
    reader, adapted = open_strict("smollm2-135m")
    with reader:
        assert ranking_of(reader, adapted).model == "smollm2-135m"
