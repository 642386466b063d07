"""Commands keep their promises on odd command lines."""

from hostile.command_lines import make_case

# all, and those of a plain run
COUNT, SAMPLE = 150, 14


def test_an_odd_command_line(number: int, withstands) -> None:
    withstands(make_case, number)
