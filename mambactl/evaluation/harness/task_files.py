"""YAML files of tasks in a folder: data, unless a person trusts the code that they name.

lm-evaluation-harness runs what `!function` names, loads metrics that are scripts of the hub or of
the current folder, and renders templates as Python expressions. Files that do any of that are
refused without `--trust-remote-code`; templates are always rendered in a sandbox.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mambactl.errors import UsageError
from mambactl.foreign import excerpt
from mambactl.plain_yaml import read_with_functions

_ALLOW = "read the file; if you trust it and what is beside it, add --trust-remote-code"


def require_data(folder: Path) -> None:
    """Raise UsageError for a YAML file in the folder, or included by one, that names code."""
    seen: set[Path] = set()
    rest = sorted(folder.glob("**/*.yaml"), reverse=True)
    while rest:
        path = Path(os.path.realpath(rest.pop()))
        if path in seen:
            continue
        seen.add(path)
        content, functions = read_with_functions(path)
        if functions:
            raise _refused(path, f"names Python code (!function {excerpt(functions[0])})")
        if (what := next(_code(content), None)) is not None:
            raise _refused(path, what)
        rest += _included(path, content)


def _refused(path: Path, what: str) -> UsageError:
    return UsageError(f"{path} {what}", _ALLOW)


def _included(path: Path, content: object) -> list[Path]:
    """The files whose keys a task takes over."""
    named = content.get("include", []) if isinstance(content, dict) else []
    found = named if isinstance(named, list) else [named]
    if not all(isinstance(name, str) for name in found):
        raise UsageError(f"{path}: `include` names no file", "give the name of a YAML file")
    return [path.parent / name for name in found]


def _code(content: object) -> Iterator[str]:
    """Yield each value of a file that would run code other than the harness's own, or write."""
    import lm_eval.api.metrics  # noqa: F401
    from lm_eval.api.registry import metric_registry
    from lm_eval.prompts import PROMPT_REGISTRY

    for key, value in _pairs(content):
        shown = excerpt(str(value))
        if key == "class":
            yield f"is a task in Python: {shown}"
        elif key == "metric" and not (isinstance(value, str) and value in metric_registry):
            # a script of the hub, or of a folder of that name
            yield f"has a metric that is code: {shown}"
        elif key == "hf_evaluate" and value:
            yield "has a metric that is code of the hub"
        elif key == "use_prompt" and str(value).partition(":")[0] not in PROMPT_REGISTRY:
            yield f"takes prompts from elsewhere: {shown}"
        elif key == "dataset_path" and str(value).endswith(".py"):
            yield f"reads a data set by a script: {shown}"
        elif key == "cache_dir" and value:
            yield f"writes into {shown}"


def _pairs(content: object) -> Iterator[tuple[object, object]]:
    """Every key and its value, at any depth, except in worked examples, whose keys are columns."""
    rest = [content]
    while rest:
        value = rest.pop()
        if isinstance(value, dict):
            yield from value.items()
            rest += [inner for key, inner in value.items() if key != "samples"]
        elif isinstance(value, list):
            rest += value


@contextmanager
def sandboxed_templates() -> Iterator[None]:
    """Let the harness render templates in Jinja's sandbox: plain Jinja reaches all of Python."""
    from jinja2 import BaseLoader, StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils

    before = utils.env
    sandbox = SandboxedEnvironment(
        loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True
    )
    sandbox.filters |= before.filters
    utils.env = sandbox
    try:
        yield
    finally:
        utils.env = before
