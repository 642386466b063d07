"""Inputs that are damaged elsewhere are whole here: every command line ends well on them."""

import shutil
from itertools import product

from hostile import checkpoints, data_files
from hostile.runner import CommandLine, faults
from hostile.starting_points import MODELS

# a folder of the inputs, the words of a command that reads it, and what it may write
LINES = [
    (model, checkpoints.words_of(model, command), ("out", *checkpoints.RESULTS))
    for command, model in product(checkpoints.COMMANDS, MODELS)
] + [
    ("records", data_files.words_of(kind, words), kind.writes)
    for kind in data_files.KINDS
    for words in kind.lines
]
COUNT, SAMPLE = len(LINES), 2


def test_a_whole_input(number: int, sandbox) -> None:
    folder, words, writes = LINES[number]
    sandbox.empty()
    shutil.copytree(sandbox.inputs / folder, sandbox.work, dirs_exist_ok=True)
    command = CommandLine(words, writes=writes)
    outcome = sandbox.run(command)
    assert outcome.ended.code == 0, outcome.err
    assert faults(command, outcome, sandbox.root) == []
