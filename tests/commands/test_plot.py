"""`mambactl plot`: checkpoints, running folders and ledgers in, one PNG out."""

import json

import pytest

pytest.importorskip("matplotlib")


def _ledger(path, kl):
    lines = [{"phase": "logits", "step": n, "tokens": n, "loss": kl, "kl": kl} for n in (1, 2)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_every_kind_of_run_is_found(cli, tmp_path) -> None:
    _ledger(tmp_path / "a" / "metrics.jsonl", 0.1)
    _ledger(tmp_path / "b.st.metrics.jsonl", 0.2)
    _ledger(tmp_path / "c.partial" / "metrics.jsonl", 0.3)
    _ledger(tmp_path / "d.jsonl", 0.4)
    done = cli("plot", "a", "b.st", "c.partial", "d.jsonl", "-o", "all.png")
    assert (done.code, done.out) == (0, "all.png\n")
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "all.png.partial").exists()
    assert cli("plot", "a").out == "metrics.png\n"


def test_what_has_no_ledger_is_a_sentence(cli, tmp_path) -> None:
    done = cli("plot", "nothing.st")
    assert done.code == 2 and "nothing.st has no metrics.jsonl" in done.err
    (tmp_path / "e.jsonl").write_text("")
    done = cli("plot", "e.jsonl", "-o", "e.png")
    assert done.code == 2 and "nothing to plot" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["e.jsonl"]
    _ledger(tmp_path / "f.jsonl", 0.1)
    done = cli("plot", "f.jsonl", "-o", "no/such/folder.png")
    assert done.code == 5 and "cannot write" in done.err
