"""Kernels are launched on the device of their inputs: Triton takes the current one."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import mambactl

KERNELS = Path(mambactl.__file__).parent / "kernels"
SEQUENCE = "mambactl.kernels.sequence"
# modules between models and kernels, and how many calls of kernels each makes at least
CALLERS = {"dispatch": 8, "local_attention": 2, "mamba_ssm_calls": 3, "operators": 6}


def launches(tree: ast.Module) -> Iterator[tuple[ast.Call, bool]]:
    """Every call of what comes from a package of kernels, and whether a guard is around it."""
    names = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(SEQUENCE)
        for alias in node.names
    }

    def visit(node: ast.AST, guarded: bool) -> Iterator[tuple[ast.Call, bool]]:
        if isinstance(node, ast.With):
            opened = {ast.unparse(item.context_expr).partition("(")[0] for item in node.items}
            guarded = guarded or "torch.cuda.device_of" in opened
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called.partition(".")[0] in names or called.startswith("loaded()["):
                yield node, guarded
        for child in ast.iter_child_nodes(node):
            yield from visit(child, guarded)

    return visit(tree, False)


@pytest.mark.parametrize(("module", "least"), CALLERS.items())
def test_every_launch_is_on_the_device_of_its_inputs(module, least) -> None:
    found = list(launches(ast.parse((KERNELS / f"{module}.py").read_text("utf-8"))))
    assert len(found) >= least
    assert [ast.unparse(call) for call, guarded in found if not guarded] == []


def test_no_other_module_calls_these_kernels() -> None:
    """The head's loss alone does, inside a guard around all of its chunks."""
    importing = {
        str(path.relative_to(KERNELS.parent))
        for path in KERNELS.parent.rglob("*.py")
        if any(
            isinstance(node, ast.ImportFrom) and (node.module or "").startswith(SEQUENCE)
            for node in ast.walk(ast.parse(path.read_text("utf-8")))
        )
        and path.parent.name not in ("sequence", "triton")
    }
    known = {f"kernels/{module}.py" for module in CALLERS} - {"kernels/mamba_ssm_calls.py"}
    assert importing == known | {"train/losses.py"}


def test_a_launch_without_a_guard_is_found() -> None:
    code = (
        f"from {SEQUENCE} import ssd\nssd.scan(x)\nwith torch.cuda.device_of(x):\n    ssd.scan(x)"
    )
    assert [guarded for _, guarded in launches(ast.parse(code))] == [False, True]
