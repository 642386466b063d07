"""The rules of the source tree: layout, direction of imports, sizes, and who may print."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from mambactl.commands import COMMANDS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mambactl"
MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCES = [*MODULES, *sorted((ROOT / "tests").rglob("*.py"))]
TOP_LEVEL = {
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "mambactl",
    "recipes",
    "tests",
    "completions",
}
LONGEST_FILE = 450
VAGUE_NAMES = {"utils", "helpers", "common", "misc"}
# openings of descriptions that only go on where a name ended
FRAGMENTS = {"Whether", "What", "How", "Which", "Where", "Of"}

# packages from the bottom up; a package may import those before it, and leaves are open to all
TABLE = "COMMANDS"
LEAVES = {
    *(
        "bounds",
        "console",
        "containment",
        "errors",
        "figures",
        "files",
        "foreign",
        "heartbeat",
        "invocation",
        "json_values",
        "lineage",
        "metrics",
    ),
    *("options", "plain_yaml", "present", "ranks"),
    *("recipes", "recipe_schema", "recipe_variants", "registration", "requirements"),
    *("stage_result", "units", "version"),
    # of the package of commands, the table alone: it names their modules and imports none
    TABLE,
}
ORDER = (
    "kernels",
    "models",
    "checkpoint",
    "data",
    "decode",
    "generation",
    "serving",
    "export",
    "evaluation",
    "report",
    "conversion",
    "train",
    "speed",
    "commands",
    "cli",
    "api",
    "__main__",
    # names of all the rest, for type checkers; what it imports by itself are leaves
    "__init__",
)
MAY_IMPORT = {name: set(ORDER[:number]) for number, name in enumerate(ORDER)}
# the probes of `eval` bring its options, without loading what they measure with
MAY_IMPORT[TABLE] = {"evaluation"}
HEAVY = {"torch", "transformers", "datasets", "trl", "accelerate", "numpy", "safetensors"}


@cache
def tree_of(path: Path) -> ast.Module:
    """The syntax tree of a file, parsed once for all tests."""
    return ast.parse(path.read_text())


def part(path: Path) -> str:
    if path == PACKAGE / "commands" / "__init__.py":
        return TABLE
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            # `from mambactl import console` names the part in its aliases
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from names if node.module == "mambactl" else [node.module]


def imported_at_load(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imports(node)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path) -> None:
    own = part(path)
    allowed = LEAVES | {own} | MAY_IMPORT.get(own, set())
    modules = {_dotted(module): module for module in MODULES}
    for name in _targets(tree_of(path), modules):
        assert part(modules[name]) in allowed, f"{own} imports {name}"


def test_the_command_line_loads_nothing_heavy() -> None:
    light = LEAVES | {"cli", "__main__", "__init__"}
    light_modules = [path for path in MODULES if part(path) in light]
    for path in [*light_modules, *(PACKAGE / "evaluation" / "probes").glob("*.py")]:
        loaded = {name.partition(".")[0] for name in imported_at_load(tree_of(path))}
        assert not loaded & HEAVY, path


def test_the_table_of_commands_loads_nothing_heavy() -> None:
    """The probes are a part of it, with all that they import at load."""
    code = "import sys, mambactl.commands; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not HEAVY & set(done.stdout.split())


def test_no_module_imports_itself_by_a_detour() -> None:
    """Imports inside functions count: a circle is two modules that are one."""
    modules = {_dotted(path): path for path in MODULES}
    graph = {}
    for name, path in modules.items():
        every = set(_targets(tree_of(path), modules)) - {name}
        graph[name] = sorted(every)
    order = TopologicalSorter(graph)
    try:
        order.prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def _dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _targets(tree: ast.AST, modules: dict[str, Path]) -> Iterator[str]:
    """Modules that a file imports anywhere; `from package import module` means the module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module in modules:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in modules else node.module


def test_every_command_has_one_file_and_every_file_a_command() -> None:
    files = [path.stem for path in (PACKAGE / "commands").rglob("*.py") if part(path) != TABLE]
    assert sorted(f"mambactl.commands.{name}" for name in files) == sorted(
        command.module for command in COMMANDS.values()
    )


def test_nobody_asks_for_a_command_by_name() -> None:
    """Differences between commands are in their rows or in the classes of their options."""
    asking = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in MODULES
        if part(path) in {"cli", "options", "recipes", "report", "train", TABLE}
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Compare) and COMMANDS.keys() & set(_words(node))
    ]
    assert asking == []


def _words(node: ast.Compare) -> Iterator[str]:
    """The texts that something is compared with, one by one or in a collection."""
    for operand in (node.left, *node.comparators):
        for word in getattr(operand, "elts", [operand]):
            if isinstance(word, ast.Constant) and isinstance(word.value, str):
                yield word.value


def test_file_names_are_unique_but_for_twins() -> None:
    """A Triton kernel has the file name of its PyTorch reference; no other name occurs twice."""
    paths: dict[str, list[Path]] = {}
    for path in MODULES:
        if path.stem not in ("__init__", "__main__"):
            paths.setdefault(path.stem, []).append(path.relative_to(PACKAGE))
    twice = {stem: found for stem, found in paths.items() if len(found) > 1}
    for stem, found in twice.items():
        assert len(found) == 2 and {path.parts[0] for path in found} == {"kernels"}, (stem, found)


MIXER_NAMES = {"attention", "mamba1", "mamba2", "mamba2_window", "mamba2_mixed"}


def test_only_mixers_know_mixers_apart() -> None:
    """No comparison with a mixer's name and no isinstance of its module outside models/mixers."""
    for path in MODULES:
        if path.is_relative_to(PACKAGE / "models" / "mixers"):
            continue
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Compare) and not _asks_a_dict(node):
                words = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
                assert not words & MIXER_NAMES, f"{path}:{node.lineno}"
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
                kinds = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
                named = {kind for kind in kinds if kind.endswith("Mixer") or "Mamba1" in kind}
                assert not named, f"{path}:{node.lineno}"


def _asks_a_dict(node: ast.Compare) -> bool:
    """True for `word in dict(...)`, about a key that may be called like a mixer."""
    return isinstance(node.comparators[0], ast.Call) and isinstance(node.ops[0], ast.In)


def test_kernels_know_nothing_of_the_rest() -> None:
    for path in (PACKAGE / "kernels").rglob("*.py"):
        names = set(imports(tree_of(path)))
        assert not {name for name in names if name.startswith("transformers")}, path


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_readable(path) -> None:
    assert len(path.read_text().splitlines()) <= LONGEST_FILE
    assert path.stem not in VAGUE_NAMES


def test_every_module_and_public_name_is_described() -> None:
    missing = []
    for path in MODULES:
        tree = tree_of(path)
        if not ast.get_docstring(tree):
            missing.append(str(path))
        public = [
            node
            for node in tree.body
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        ]
        missing += [f"{path}: {node.name}" for node in public if not ast.get_docstring(node)]
    assert missing == []


def test_descriptions_stand_alone() -> None:
    """They say a thing or what to do, in three words or more; scripts of recipes and tests too."""
    fragments = []
    for path in [*SOURCES, *sorted((ROOT / "recipes").glob("*.py"))]:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                words = (ast.get_docstring(node) or "").split()
                if words and (words[0] in FRAGMENTS or len(words) < 3):
                    fragments.append(f"{path}: {' '.join(words[:9])}")
    assert fragments == []


def test_sentences_name_options_as_flags() -> None:
    """Errors of what commands run, and descriptions: nobody types an underscore."""
    fields = {name for row in COMMANDS.values() for name in row.options.model_fields if "_" in name}
    # a setting is a key of YAML, and the methods of TRL have names of their own
    named = re.compile(rf"(?<![\w.`-])({'|'.join(fields)})(?![\w.`])")
    parts = {"commands", "conversion", "data", "evaluation", "generation", "options", "report"}
    found = []
    for path in MODULES:
        if part(path) not in parts | {"cli", "speed", "train"}:
            continue
        for node in ast.walk(tree_of(path)):
            name = getattr(node, "func", None) and ast.unparse(node.func).rpartition(".")[2]
            if name in ("UsageError", "OutputError", "CheckError", "warn", "log", "Field"):
                found += [f"{path}: {text}" for text in _texts(node) if named.search(text)]
    assert found == []


def _texts(node: ast.AST) -> Iterator[str]:
    for each in ast.walk(node):
        text = each.value if isinstance(each, ast.Constant) else None
        if isinstance(text, str) and not text.startswith("--set "):
            yield text


def test_nobody_prints() -> None:
    for path in MODULES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "print", f"{path}:{node.lineno}"


def test_top_level_is_exactly_the_layout() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    names = {Path(line).parts[0] for line in listed.stdout.splitlines()}
    assert {name for name in names if not name.startswith(".")} == TOP_LEVEL


# a word of the glossary in `mambactl.models` and where it may be part of an identifier: files or
# whole packages; nobody uses "place", as an index, a slot, a path or a device is what it is
CHATS = {"data", "generation", "decode/prompts.py", "evaluation/harness/scoring.py"}
EXPERIMENTS = {
    *("evaluation", "report", "api", "commands/eval.py", "options/evaluation.py"),
    # of transformers' own callbacks
    *("train/trainer.py", "train/preference.py"),
}
ATTENTION = {
    *("kernels/local_attention.py", "kernels/sequence/local_attention.py"),
    *("kernels/reference.py", "kernels/decode/operations.py"),
    *("kernels/decode/reference/decode_attention.py", "kernels/decode/triton/decode_attention.py"),
    *("kernels/decode/reference/recurrent.py", "kernels/decode/triton/mamba2_beside.py"),
    *("kernels/decode/triton/ops.py", "kernels/decode/cpu/cpu_ops.py"),
    *("kernels/decode/cpu/pass_rows.py", "kernels/decode/cpu/single.py"),
    *("models/cache.py", "models/config.py", "models/hybrid.py", "models/key_ring.py"),
    *("models/packed.py", "models/mixers/attention.py", "models/mixers/registry.py"),
    *("models/mixers/spec.py", "models/mixers/windowed.py", "train/optimization.py"),
    *("models/mixers/mixed.py", "models/mixers/mixed_decode.py", "models/layout.py"),
    *("models/mixers/settings.py", "models/mixers/sizes.py"),
    *("train/drawn_windows.py", "train/loop.py"),
    *("checkpoint", "commands", "conversion", "evaluation", "export", "options"),
    *("models/cache_bytes.py", "models/session_size.py", "speed/shapes.py"),
    "speed/shape_table.py",
}
MEANINGS = {
    "place": set(),
    "places": set(),
    "turn": CHATS,
    "turns": CHATS,
    "turned": set(),
    "turning": set(),
    "control": EXPERIMENTS,
    "controls": EXPERIMENTS,
    "window": ATTENTION,
    "windows": ATTENTION,
}
# names of a mixer, of settings and of what links mixers, wherever they are used
KNOWN_NAMES = {"mamba2_window", "sliding_window", "with_window"}
# of `kernels/reference.py`, the one function that is about attention
SPANS = "spans"


def identifiers(tree: ast.AST) -> Iterator[str]:
    """Names of functions, classes, parameters, variables, attributes, keywords and imports."""
    for node in ast.walk(tree):
        for field in ("name", "arg", "id", "attr", "asname", "names"):
            value = getattr(node, field, None)
            for name in value if isinstance(value, list) else [value]:
                if isinstance(name, str):
                    yield name


def misused(tree: ast.AST, path: str) -> set[str]:
    """Identifiers of a file of the package in which a word means something else."""
    return {
        name
        for name in set(identifiers(tree)) - KNOWN_NAMES
        for word in re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().split("_")
        if word in MEANINGS
        and not {path, *(str(parent) for parent in Path(path).parents)} & MEANINGS[word]
    }


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_words_of_the_glossary_have_one_meaning(path) -> None:
    own = str(path.relative_to(PACKAGE))
    assert misused(tree_of(path), own) == set()


def test_a_window_of_the_reference_kernels_is_that_of_attention() -> None:
    tree = ast.parse((PACKAGE / "kernels" / "reference.py").read_text())
    users = {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and "window" in set(identifiers(node))
    }
    assert users == {SPANS}


@pytest.mark.parametrize(
    ("line", "path", "found"),
    [
        ("for place in range(3): pass", "data/pack.py", {"place"}),
        ("def f(in_place): pass", "train/captured.py", {"in_place"}),
        ("class Place: pass", "train/estimate.py", {"Place"}),
        ("from mambactl.ranks import placement", "api/text.py", set()),
        ("ops.turn(B)", "kernels/decode/triton/ops.py", {"turn"}),
        ("from mambactl.kernels.reference import turn as rotate", "models/packed.py", {"turn"}),
        ("turns = row['turns']", "data/conversations.py", set()),
        ("run(control=x)", "kernels/decode/reference/verdict.py", {"control"}),
        ("if config.control: run()", "commands/eval.py", set()),
        ("def mamba2_segment(window): pass", "kernels/decode/reference/verdict.py", {"window"}),
        ("conv_window = previous", "models/mixers/mamba1.py", {"conv_window"}),
        ("WINDOW: int = 4", "kernels/sequence/conv.py", {"WINDOW"}),
        ("window = 'mamba2_window'", "kernels/local_attention.py", set()),
        ("mixer.with_window", "models/mixers/mamba2.py", set()),
        ("text = 'in place of a window'", "kernels/dispatch.py", set()),
    ],
)
def test_other_meanings_are_found(line, path, found) -> None:
    assert misused(ast.parse(line), path) == found


def test_every_word_with_one_meaning_is_in_the_glossary() -> None:
    glossary = ast.get_docstring(ast.parse((PACKAGE / "models" / "__init__.py").read_text()))
    terms = {line[2:].partition(":")[0] for line in glossary.splitlines() if line.startswith("- ")}
    assert {"window", "control", "turn", "placement", "segment", "rotation"} <= terms


def test_every_file_in_the_table_of_meanings_exists() -> None:
    for path in set().union(*MEANINGS.values()):
        assert (PACKAGE / path).exists(), path
