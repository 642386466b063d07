"""Commands keep their promises on damaged checkpoints."""

from hostile.checkpoints import make_case

# all, and those of a plain run
COUNT, SAMPLE = 1000, 18


def test_a_damaged_checkpoint(number: int, withstands) -> None:
    withstands(make_case, number)
