"""Ledgers become pictures, or a sentence says why not."""

import json
import sys

import pytest

from mambactl.errors import ResourceError, UsageError
from mambactl.evaluation.heatmap import draw_grids
from mambactl.figures import literal, new_figure
from mambactl.report.plots import curves, draw, read_ledger


def ledger(path, held=True):
    lines = [{"phase": "align", "step": 1, "loss": 0.5, "tokens": 10}]
    lines += [{"phase": "logits", "step": n, "loss": 1 / n, "tokens": 10 + n} for n in (1, 2, 3)]
    if held:
        lines[0] |= {"kl": 2.0}
        lines[-1] |= {"kl": 0.4}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_curves_are_held_out_kl_and_loss_on_logits(tmp_path) -> None:
    found = curves(read_ledger(ledger(tmp_path / "m.jsonl")))
    assert found["held out"] == [(10, 2.0), (13, 0.4)]
    assert found["training"] == [(11, 1.0), (12, 0.5), (13, 1 / 3)]


@pytest.mark.parametrize("held", [True, False])
def test_a_png_with_a_curve_per_ledger(tmp_path, held) -> None:
    pytest.importorskip("matplotlib")
    one, two = ledger(tmp_path / "a.jsonl", held), ledger(tmp_path / "b.jsonl", held)
    draw({"a": one}, tmp_path / "one.png")
    draw({"a": one, "b": two}, tmp_path / "two.partial")
    content = (tmp_path / "one.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert content != (tmp_path / "two.partial").read_bytes()


def test_a_name_is_no_formula(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    path = ledger(tmp_path / "m.jsonl")
    # unbalanced braces and unknown commands are errors in a formula
    draw({"out$x^{$ $\\frac$": path, r"one\$\two$": path}, tmp_path / "m.png")
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")
    assert _drawn(literal("a$b$")) == "a$b$"
    draw_grids({"$^{$": [[1.0]]}, [64], [0.5], "needle: $^{$", tmp_path / "n.png")
    assert (tmp_path / "n.png").read_bytes().startswith(b"\x89PNG")


def _drawn(text: str) -> str:
    """The letters that matplotlib puts on paper."""
    figure = new_figure((2, 2))
    return figure.text(0, 0, text)._preprocess_math(text)[0]


def test_nothing_to_plot_is_a_sentence(tmp_path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"phase": "align", "step": 1, "loss": 0.5, "tokens": 10}\n')
    with pytest.raises(UsageError, match="nothing to plot"):
        draw({"m": path}, tmp_path / "m.png")
    assert not (tmp_path / "m.png").exists()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{\n", "no ledger"),
        ("[1]\n", "no ledger"),
        ('{"a": 1}\n', "no ledger"),
        (None, "cannot be used .No such file"),
    ],
)
def test_other_files_are_no_ledgers(tmp_path, text, sentence) -> None:
    path = tmp_path / "m.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=sentence):
        read_ledger(path)


def test_a_missing_library_is_a_sentence(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(ResourceError, match="need matplotlib") as caught:
        draw({"m": ledger(tmp_path / "m.jsonl")}, tmp_path / "m.png")
    assert "mambactl[plots]" in caught.value.hint
