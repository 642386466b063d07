"""The block of results in a card: put in once, replaced later, nothing else touched."""

from mambactl.checkpoint.card import BEGIN, END, between, with_results


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
