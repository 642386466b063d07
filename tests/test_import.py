"""Cost and effects of `import mambactl`: what it loads, and what transformers then knows."""

import ast
import importlib
import pkgutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import mambactl

HEAVY = ("torch", "transformers", "pydantic", "typer", "rich", "numpy", "yaml")
# seconds that the import may add to those of a bare interpreter
COST = 0.05
TRIES = 10
ORDERS = {
    "mambactl first": "import mambactl, transformers",
    "transformers first": "import transformers, mambactl",
    "its tables first": "import transformers.models.auto.modeling_auto, transformers, mambactl",
    "in threads, behind another finder": """
import sys, threading
import mambactl
class Finder:
    def find_spec(self, name, path=None, target=None): return None
sys.meta_path.insert(0, Finder())
def later():
    import transformers.models.auto.modeling_auto
threads = [threading.Thread(target=later) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
import transformers
""",
}
LOADING = """
import sys
path = sys.argv[1]
assert not [name for name in sys.modules if name.startswith("mambactl.models")]
config = transformers.AutoConfig.from_pretrained(path)
tokenizer = transformers.AutoTokenizer.from_pretrained(path)
model = transformers.AutoModelForCausalLM.from_pretrained(path)
print(type(config).__name__, type(model).__name__, type(model).__module__)
assert transformers.HybridForCausalLM is type(model)
print(tokenizer.decode(tokenizer("the old house").input_ids))
"""


def run(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def seconds(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


def test_it_loads_nothing_heavy() -> None:
    loaded = run("import sys, mambactl; print(*sys.modules)").split()
    assert "mambactl" in loaded
    assert not set(HEAVY) & {name.partition(".")[0] for name in loaded}


def test_it_takes_no_time() -> None:
    """In turn, and the quickest of each: other work on the machine slows both."""
    bare, whole = [], []
    for _ in range(TRIES):
        bare.append(seconds("pass"))
        whole.append(seconds("import mambactl"))
    assert min(whole) - min(bare) <= COST


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", sorted(ORDERS))
def test_transformers_loads_a_checkpoint(name: str, tmp_path: Path, save_student) -> None:
    path = save_student(tmp_path / "student")
    classes, text = run(ORDERS[name] + LOADING, str(path)).splitlines()
    assert classes == "HybridConfig HybridForCausalLM mambactl.models.hybrid"
    assert text == "the old house"


def test_without_a_checkpoint_transformers_loads_none_of_it() -> None:
    code = """
import sys, mambactl
from transformers import AutoConfig, LlamaConfig
assert isinstance(AutoConfig.for_model("llama"), LlamaConfig)
print(*[name for name in sys.modules if name.startswith("mambactl")])
"""
    found = set(run(code).split())
    assert found == {"mambactl", "mambactl.registration", "mambactl.version"}


def test_other_machinery_of_imports_goes_on() -> None:
    """Distributions, sources, pickles and reloads of the module whose import is watched."""
    code = """
import importlib, importlib.metadata, inspect, pickle
import mambactl
from transformers.models.auto import configuration_auto as table
assert importlib.metadata.version("transformers")
assert type(table.__loader__).__name__ == "SourceFileLoader"
assert table.__spec__.loader is table.__loader__
assert "CONFIG_MAPPING_NAMES" in inspect.getsource(table)
mapping = pickle.loads(pickle.dumps(table.CONFIG_MAPPING))
assert mapping["mambactl_hybrid"].model_type == "mambactl_hybrid"
assert "mambactl_hybrid" in importlib.reload(table).CONFIG_MAPPING_NAMES
importlib.invalidate_caches()
print(importlib.util.find_spec("mambactl_of_nobody"))
"""
    assert run(code).split() == ["None"]


def modules() -> list[str]:
    found = pkgutil.walk_packages(mambactl.__path__, "mambactl.")
    return [module.name for module in found if not module.name.endswith("__main__")]


def test_no_module_takes_the_place_of_a_function() -> None:
    """An imported submodule becomes an attribute of its package."""
    code = f"""
import importlib, types
for name in {modules()!r}:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        # of an optional package
        assert not error.name.startswith("mambactl"), name
import mambactl
for name in mambactl.__all__:
    found = getattr(mambactl, name)
    assert callable(found) or name == "__version__", name
    print(name)
"""
    assert run(code).split() == mambactl.__all__


def test_type_checkers_see_the_names_that_are_there() -> None:
    tree = ast.parse(Path(mambactl.__file__).read_text())
    blocks = [node for node in tree.body if isinstance(node, ast.If)]
    block = next(each for each in blocks if ast.unparse(each.test) == "TYPE_CHECKING")
    seen = {
        alias.asname: node.module.removeprefix("mambactl.")
        for node in block.body
        for alias in node.names
    }
    assert seen == mambactl._HOMES
    assert set(mambactl.__all__) <= set(dir(mambactl))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'konvert'"):
        _ = mambactl.konvert
    with pytest.raises(ImportError):
        importlib.import_module("mambactl.konvert")


def test_an_older_python_is_refused_in_a_sentence(monkeypatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 13, "final", 0))
    code = Path(mambactl.__file__).read_text()
    with pytest.raises(ImportError, match=r"needs Python 3\.11 or newer, and this is 3\.10\.13:"):
        exec(compile(code, mambactl.__file__, "exec"), {"__name__": "mambactl"})
