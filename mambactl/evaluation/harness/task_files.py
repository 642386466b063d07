"""YAML files of tasks in a folder: data, unless a person trusts the code that they name.

lm-evaluation-harness runs what `!function` names, loads metrics that are scripts of the hub or of
the current folder, and renders templates as Python expressions. Files that do any of that are
refused without `--trust-remote-code`; templates are always rendered in a sandbox.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
        for what in _code(content):
            raise _refused(path, what)
        rest += _included(path, content)


def _refused(path: Path, what: str) -> UsageError:
    return UsageError(f"{path} {what}", _ALLOW)


def _included(path: Path, content: Any) -> list[Path]:
    """The files whose keys a task takes over."""
    named = content.get("include", []) if isinstance(content, dict) else []
    found = named if isinstance(named, list) else [named]
    if not all(isinstance(name, str) for name in found):
        raise UsageError(f"{path}: `include` names no file", "give the name of a YAML file")
    return [path.parent / name for name in found]


def _code(content: Any) -> Iterator[str]:
    """What in the values of a file would run code that is not the harness's own."""
    kinds = _keys()
    for key, value in _pairs(content):
        if key in kinds and (what := kinds[key](value)):
            yield what


def _pairs(content: Any) -> Iterator[tuple[Any, Any]]:
    """Every key and its value, at any depth."""
    rest = [content]
    while rest:
        value = rest.pop()
        if isinstance(value, dict):
            yield from value.items()
            rest += value.values()
        elif isinstance(value, list):
            rest += value


def _keys() -> Mapping[str, Callable[[Any], str | None]]:
    """Keys that may run code, and what to say of a value that does."""
    import lm_eval.api.metrics  # noqa: F401
    from lm_eval.api.registry import metric_registry
    from lm_eval.prompts import PROMPT_REGISTRY

    def metric(name: Any) -> str | None:
        # a name that the harness has not is a script of the hub, or of a folder of that name
        known = isinstance(name, str) and name in metric_registry
        return None if known else f"has a metric that is code: {excerpt(str(name))}"

    def prompt(name: Any) -> str | None:
        known = str(name).partition(":")[0] in PROMPT_REGISTRY
        return None if known else f"takes prompts from elsewhere: {excerpt(str(name))}"

    def script(name: Any) -> str | None:
        return f"reads a data set by a script: {excerpt(name)}" if _is_script(name) else None

    return {
        "metric": metric,
        "use_prompt": prompt,
        "dataset_path": script,
        "class": lambda value: f"is a task in Python: {excerpt(str(value))}",
        "cache_dir": lambda value: f"writes into {excerpt(str(value))}" if value else None,
        "hf_evaluate": lambda value: "has a metric that is code of the hub" if value else None,
    }


def _is_script(name: Any) -> bool:
    return isinstance(name, str) and name.endswith(".py")


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
