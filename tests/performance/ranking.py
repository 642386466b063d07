"""The ranking of a teacher's KV heads that `convert --select` measured, as the package ships it.

    mambactl convert smollm2-135m --ratio 0.5 --select recall -o s.st
    python -m tests.performance.ranking s.st > recipes/rankings/smollm2-135m.json

Reads the lineage of the student, and keys and values of the teacher that it names.
"""

import sys
from argparse import ArgumentParser, Namespace

from mambactl.stage_result import StageResult
from tests.performance import command

PARSER = ArgumentParser("python -m tests.performance.ranking", description=__doc__.splitlines()[0])
PARSER.add_argument("student", help="checkpoint that convert --by head --select wrote")
PARSER.add_argument("--model", help="what the teacher is called; default: as it was given")
PARSER.set_defaults(json=False)


def measure(given: Namespace) -> StageResult:
    """The file's content; nothing is measured again."""
    from mambactl.conversion.shipped import ranking_from, written

    text = written(ranking_from(given.student, given.model))
    return StageResult(None, {}, text.rstrip("\n"))


if __name__ == "__main__":
    sys.exit(command.run(measure, PARSER.parse_args()))
