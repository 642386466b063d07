"""The block of results in a card: put in once, replaced later, nothing else touched."""

from mambactl.checkpoint.card import BEGIN, END, about, between, with_results


def test_results_are_added_and_then_replaced() -> None:
    card = "---\nfront\n---\n\n# model\n"
    once = with_results(card, "KL 0.5")
    assert once == f"{card}\n{BEGIN}\nKL 0.5\n{END}\n"
    twice = with_results(once + "\nwritten by hand\n", "KL 0.4")
    assert twice == f"{card}\n{BEGIN}\nKL 0.4\n{END}\n\nwritten by hand\n"


def test_half_a_pair_of_marks_is_none() -> None:
    assert between("a [ b", "[", "]", "x") is None
    assert between("a ] b [ c", "[", "]", "x") is None
    assert between("a [ b ] c", "[", "]", "x") == "a [\nx\n] c"


def test_about_says_how_it_was_trained_and_what_it_cannot_do() -> None:
    trained = {"steps": 30, "tokens": 61_440, "seconds": 12.4}
    lineage = {
        "stage": "sft",
        "recipe": {"data": ["a.jsonl", "org/set"]},
        "metrics": {"sft": trained, "kl": 0.1, "odd": {"steps": "many", "tokens": 1, "seconds": 1}},
        "ancestors": [{"stage": "distill", "metrics": {"align": trained | {"steps": 10}}}],
    }
    text = about(lineage, {"mixers": ["attention", "mamba2_window"]}, "org/model")
    assert "| sft | 30 | 61,440 | 12 | `a.jsonl`, `org/set` |" in text
    assert "| distill, align | 10 | 61,440 | 12 |  |" in text
    assert "odd" not in text
    assert "recalled less exactly" in text and "Programs other than mambactl" in text
    untrained = about({"stage": "convert"}, {"mixers": ["attention"]}, "org/model")
    assert "No step of training" in untrained and "recalled" not in untrained
