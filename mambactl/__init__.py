"""mambactl: turn a Llama-family checkpoint into a hybrid Mamba model, and decode it fast.

Every command has a function here, with the command's options as keywords:

    import mambactl

    student = mambactl.convert("llama3-8b", "student.st", ratio=0.5)
    tuned = mambactl.distill(student.path, data=["chat.jsonl"])
    print(mambactl.generate(tuned.path, "Why is the sky blue?")[0].text)

Importing the package loads neither torch nor transformers; a function loads what it needs. What
can be expected to go wrong is raised as a class of `mambactl.errors`. Functions print nothing on
stdout, and on stderr only warnings until `set_verbosity` asks for more. Once mambactl is imported,
transformers' Auto classes load its checkpoints.
"""

import sys

# pip refuses an older one by itself, PYTHONPATH does not
if sys.version_info < (3, 11):  # noqa: UP036
    raise ImportError(
        "mambactl needs Python 3.11 or newer, and this is "
        + ".".join(map(str, sys.version_info[:3]))
        + ": make an environment with `python3.11 -m venv .venv`"
    )

from mambactl.registration import register
from mambactl.version import __version__ as __version__

# as type checkers know it; `typing` takes longer to import than all the rest
TYPE_CHECKING = False
if TYPE_CHECKING:
    from mambactl.api.making import convert as convert
    from mambactl.api.making import distill as distill
    from mambactl.api.making import dpo as dpo
    from mambactl.api.making import draft as draft
    from mambactl.api.making import export_model as export_model
    from mambactl.api.making import generate_dataset as generate_dataset
    from mambactl.api.making import run_recipe as run_recipe
    from mambactl.api.making import sft as sft
    from mambactl.api.making import synthetic as synthetic
    from mambactl.api.making import teacher_cache as teacher_cache
    from mambactl.api.measuring import bench as bench
    from mambactl.api.measuring import evaluate as evaluate
    from mambactl.api.measuring import plan as plan
    from mambactl.api.measuring import spec_decode as spec_decode
    from mambactl.api.showing import doctor as doctor
    from mambactl.api.showing import inspect as inspect
    from mambactl.api.showing import plot as plot
    from mambactl.api.showing import push as push
    from mambactl.api.showing import read_docs as read_docs
    from mambactl.api.showing import table as table
    from mambactl.api.showing import write_report as write_report
    from mambactl.api.text import Completion as Completion
    from mambactl.api.text import Model as Model
    from mambactl.api.text import chat as chat
    from mambactl.api.text import generate as generate
    from mambactl.api.text import load as load
    from mambactl.api.text import serve as serve
    from mambactl.api.text import stream as stream
    from mambactl.console import set_verbosity as set_verbosity
    from mambactl.decode.sampler import SamplingParams as SamplingParams
    from mambactl.generation.dialogue import Answer as Answer
    from mambactl.generation.dialogue import Chat as Chat
    from mambactl.stage_result import StageResult as StageResult

# the module of every public name, imported when the name is first asked for
_HOMES = {
    "Answer": "generation.dialogue",
    "Chat": "generation.dialogue",
    "Completion": "api.text",
    "Model": "api.text",
    "SamplingParams": "decode.sampler",
    "StageResult": "stage_result",
    "bench": "api.measuring",
    "chat": "api.text",
    "convert": "api.making",
    "distill": "api.making",
    "doctor": "api.showing",
    "dpo": "api.making",
    "draft": "api.making",
    "evaluate": "api.measuring",
    "export_model": "api.making",
    "generate": "api.text",
    "generate_dataset": "api.making",
    "inspect": "api.showing",
    "load": "api.text",
    "plan": "api.measuring",
    "plot": "api.showing",
    "push": "api.showing",
    "read_docs": "api.showing",
    "run_recipe": "api.making",
    "serve": "api.text",
    "set_verbosity": "console",
    "sft": "api.making",
    "spec_decode": "api.measuring",
    "stream": "api.text",
    "synthetic": "api.making",
    "table": "api.showing",
    "teacher_cache": "api.making",
    "write_report": "api.showing",
}
__all__ = ["__version__", *_HOMES]

register()


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    found = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
