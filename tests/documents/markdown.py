"""The documents of the project, and the command lines in them."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    [ROOT / "README.md", *(ROOT / "mambactl" / "docs").glob("*.md"), *ROOT.glob("recipes/**/*.md")]
)
# of a fence, the language and what is inside
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_HEREDOC = re.compile(r"<<'(\w+)'\n.*?^\1$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`(mambactl [^`]+)`")
_ENDS = {"|", "||", "&&", ";", "&", ">", ">>", "<", "(", ")"}
SHELL, SESSION, PROMPT = "bash", "console", "$ "


def blocks(text: str, language: str = SHELL) -> list[str]:
    """Contents of the fenced blocks of a language, in order."""
    return [inside for name, inside in _FENCE.findall(text) if name == language]


def commands(text: str) -> Iterator[list[str]]:
    """Arguments of every `mambactl` in the shell blocks of a document."""
    for block in blocks(text):
        script = _HEREDOC.sub("", block).replace("\\\n", " ")
        for line in script.splitlines():
            yield from _in_line(line)
    for block in blocks(text, SESSION):
        # lines without a prompt are output
        for line in block.splitlines():
            if line.startswith(PROMPT):
                yield from _in_line(line.removeprefix(PROMPT))


def _in_line(line: str) -> Iterator[list[str]]:
    words = shlex.shlex(line, posix=True, punctuation_chars=True)
    words.whitespace_split, words.commenters = True, "#"
    found: list[str] | None = None
    for word in [*words, ";"]:
        if word in _ENDS:
            if found is not None:
                yield found
            found = None
        elif found is not None:
            found.append(word)
        elif word == "mambactl" or word.endswith("/mambactl"):
            found = []


def mentioned(text: str) -> Iterator[list[str]]:
    """Arguments of every command line that a sentence or table names in passing."""
    for span in _INLINE.findall(_FENCE.sub("", text)):
        yield from _in_line(span)
