"""Tell transformers of mambactl's checkpoints, without importing transformers.

transformers knows a model type by the name of its configuration class, in a table, and by a module
`transformers.models.<type>` that holds the class. A finder on `sys.meta_path` adds the name when
the table is imported and answers for the module when it is asked for, by then with mambactl's own.
peft, which knows by a table of its own what to adapt in a model of a type, learns it as well.
Nothing is imported before a checkpoint of the type is opened.

Where this package was not imported, `trust_remote_code=True` does the same by a file beside the
weights, whose text is here too.
"""

import sys
from importlib.abc import Loader

TYPE, CONFIG = "mambactl_hybrid", "HybridConfig"
OURS = "mambactl.models.hybrid"
TABLE = "transformers.models.auto.configuration_auto"
MODULE = f"transformers.models.{TYPE}"
PEFT_TABLE = "peft.utils.constants"
# what peft adapts where nothing else is asked for, as in a Llama
ADAPTED = ["q_proj", "v_proj", "in_proj"]

STUB = "modeling_mambactl.py"
STUB_TEXT = f'''"""Load this checkpoint by the classes of mambactl: pip install mambactl."""

from {OURS} import HybridConfig, HybridForCausalLM, HybridModel

__all__ = ["HybridConfig", "HybridForCausalLM", "HybridModel"]
'''
# the classes of that file, as a configuration names them
CLASSES = {
    "AutoConfig": CONFIG,
    "AutoModel": "HybridModel",
    "AutoModelForCausalLM": "HybridForCausalLM",
}
AUTO_MAP = {auto: f"{STUB.removesuffix('.py')}.{name}" for auto, name in CLASSES.items()}


class _Completing:
    """The loader of a table, which adds the type once the table is there."""

    def __init__(self, loader, add):
        self._loader, self._add = loader, add

    def __getattr__(self, name):
        if name in ("_loader", "_add"):
            # not set yet: in a copy that is being made
            raise AttributeError(name)
        return getattr(self._loader, name)

    def exec_module(self, module) -> None:
        # what reads sources or data through a module's loader finds the real one
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._add(module)


class _Renaming(Loader):
    """The loader of `MODULE`: the public classes of mambactl's own module."""

    def create_module(self, spec) -> None:
        return None

    def exec_module(self, module) -> None:
        __import__(OURS)
        ours = sys.modules[OURS]
        for name in CLASSES.values():
            setattr(module, name, getattr(ours, name))


class _Finder:
    """Finds the modules that concern us and leaves every other to the finders behind it."""

    def find_spec(self, name, path=None, target=None):
        if name in TABLES:
            spec = self._of_others(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Completing(spec.loader, TABLES[name])
            return spec
        if name == MODULE:
            from importlib.machinery import ModuleSpec

            return ModuleSpec(name, _Renaming(), origin=OURS)
        return None

    def _of_others(self, name, path, target):
        for finder in list(sys.meta_path):
            find = getattr(finder, "find_spec", None)
            if isinstance(finder, _Finder) or find is None:
                continue
            if (spec := find(name, path, target)) is not None:
                return spec
        return None


def register() -> None:
    """Make `AutoConfig` and `AutoModelForCausalLM` load our checkpoints, now or once imported."""
    # never removed: another thread may be walking through the list
    sys.meta_path.insert(0, _Finder())
    for name, add in TABLES.items():
        if name in sys.modules:
            # another thread may still be importing it: this waits for it
            __import__(name)
            add(sys.modules[name])


def add_names() -> None:
    """Let `transformers` have the classes as attributes, where `transformers serve` finds a class.

    The package may have run twice, and modules that are older hold the first one.
    """
    held = [
        getattr(module, "__dict__", {}).get("transformers") for module in list(sys.modules.values())
    ]
    for package in {id(one): one for one in (sys.modules.get("transformers"), *held)}.values():
        homes = getattr(package, "_class_to_module", None)
        if isinstance(homes, dict):
            homes.update(dict.fromkeys(CLASSES.values(), f"models.{TYPE}"))


def _add_class(table) -> None:
    _add(table, "CONFIG_MAPPING_NAMES", CONFIG)


def _add_targets(table) -> None:
    _add(table, "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING", ADAPTED)


def _add(table, attribute, value) -> None:
    values = getattr(table, attribute, None)
    if isinstance(values, dict):
        values.setdefault(TYPE, value)


TABLES = {TABLE: _add_class, PEFT_TABLE: _add_targets}
