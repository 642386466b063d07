"""Fixtures of hostile inputs: a few of each kind in every run, all of them with `-m hostile`."""

import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
from hostile.runner import CommandLine, Sandbox, faults
from hostile.starting_points import keep_answers, make_inputs

SEED = "--hostile-seed"
MakeCase = Callable[[Random, Path, Path], tuple[CommandLine, str]]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(SEED, type=int, default=0, help="draw other hostile inputs than those of 0")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for every number below the module's COUNT, or below its SAMPLE in a plain run."""
    if "number" not in metafunc.fixturenames:
        return
    module = metafunc.module
    asked = metafunc.config.option.markexpr
    whole = "hostile" in asked and "not hostile" not in asked
    marks = [pytest.mark.hostile] if whole else []
    numbers = range(module.COUNT if whole else module.SAMPLE)
    metafunc.parametrize("number", [pytest.param(number, marks=marks) for number in numbers])


@pytest.fixture(scope="session")
def sandbox(tmp_path_factory) -> Iterator[Sandbox]:
    """A folder where commands run, with every input."""
    box = Sandbox(tmp_path_factory.mktemp("hostile").resolve())
    make_inputs(box.inputs, box.work)
    keep_answers(box)
    yield box
    box.close()


@pytest.fixture
def withstands(sandbox, request) -> Callable[[MakeCase, int], None]:
    """withstands(make_case, number): make the case, run it, and fail if a promise is broken."""
    seed = request.config.getoption(SEED, 0)

    def check(make_case: MakeCase, number: int) -> None:
        sandbox.empty()
        draw = Random(f"{make_case.__module__}-{seed}-{number}")
        command, what = make_case(draw, sandbox.inputs, sandbox.work)
        outcome = sandbox.run(command)
        found = faults(command, outcome, sandbox.root)
        if found:
            again = f"python -m pytest -m hostile '{request.node.nodeid}' {SEED} {seed}"
            lines = [
                *found, what, shlex.join(("mambactl", *command.words)), str(outcome.ended),
                *outcome.err.splitlines()[-12:], again,
            ]  # fmt: skip
            pytest.fail("\n".join(ascii(line)[1:-1] for line in lines), pytrace=False)

    return check
