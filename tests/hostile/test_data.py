"""Commands keep their promises on damaged data, recipes, results and run records."""

from hostile.data_files import make_case

# all, and those of a plain run
COUNT, SAMPLE = 300, 12


def test_a_damaged_file(number: int, withstands) -> None:
    withstands(make_case, number)
