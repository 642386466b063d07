"""A wheel, installed where the source tree is not, does what README says.

Libraries come from the environment of the tests, so that only mambactl itself is installed.
"""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
LINES = (
    ("recipe list", "quickstart"),
    ("recipe show quickstart", "calibrate_tokens: 2048"),
    ("recipe schema", '"stages"'),
    ("docs", "`tutorial`"),
    ("docs tutorial", "# Tutorial"),
    ("docs rows", "# Rows of data"),
    ("docs reference", "## mambactl convert"),
    ("doctor", "mambactl"),
    ("--help", "Make a student"),
)
SHARED = (
    "bash-completion/completions/mambactl",
    "zsh/site-functions/_mambactl",
    "fish/vendor_completions.d/mambactl.fish",
)


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    """A virtual environment with the wheel, and a line that adds the libraries of this one."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", folder, ROOT], check=True, timeout=600)
    (wheel,) = folder.glob("mambactl-*.whl")
    home = folder / "env"
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    install = [*pip, "--python", python, "install", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True, timeout=600)
    (packages,) = home.glob("lib/python*/site-packages")
    # a plain path: of an editable install there, which this interpreter may have, nothing is read
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home


@pytest.fixture
def installed(environment, tmp_path, monkeypatch):
    """installed("docs", NAME="value") -> what the installed program did in an empty folder."""
    monkeypatch.chdir(tmp_path)
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def call(*words: str, **extra: str) -> subprocess.CompletedProcess[str]:
        command = [environment / "bin" / "mambactl", *words]
        return subprocess.run(
            command, capture_output=True, text=True, env=variables | extra, timeout=600
        )

    return call


def test_the_wheel_and_not_the_source_tree_is_imported(environment, tmp_path) -> None:
    code = "import mambactl; print(mambactl.__file__)"
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found = subprocess.check_output(
        [environment / "bin" / "python", "-c", code], cwd=tmp_path, env=variables, text=True
    )
    assert Path(found.strip()).is_relative_to(environment)


@pytest.mark.parametrize(("line", "shown"), LINES)
def test_what_is_shipped_is_found(installed, line, shown) -> None:
    done = installed(*line.split())
    assert (done.returncode, done.stderr) == (0, "") and shown in done.stdout


def test_completion_is_installed_and_offers_recipes(environment, installed) -> None:
    for name in SHARED:
        assert (environment / "share" / name).is_file(), name
    words = {"COMP_WORDS": "mambactl\nrecipe\nrun\nqui", "COMP_CWORD": "3"}
    done = installed(_MAMBACTL_COMPLETE="complete_bash", **words)
    assert done.stdout.split() == ["quickstart"]


def test_the_quick_start_is_planned(installed) -> None:
    done = installed("recipe", "run", "quickstart", "--dry-run")
    assert (done.returncode, done.stdout) == (0, "")
    assert (
        "[1/4] mambactl convert smollm2-135m" in done.stderr and "quickstart.jsonl" in done.stderr
    )


def test_the_quick_start_runs_and_ends_with_its_page(installed, tiny_llama_dir, tmp_path) -> None:
    settings = (
        f"convert.model={tiny_llama_dir}", "convert.device=cpu", "distill.device=cpu",
        "eval.device=cpu", "bench.device=cpu", "convert.calibrate_tokens=512",
        "distill.max_steps=1", "distill.max_length=64", "distill.warmup=0", "eval.max_length=64",
        "eval.limit=2", "eval.recall=[]", "eval.fail_under=[]", "eval.generation_tokens=4",
        "bench.input_len=[8]", "bench.output_len=4", "bench.iters=1",
    )  # fmt: skip
    flags = [word for setting in settings for word in ("--set", setting)]
    done = installed("recipe", "run", "quickstart", *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'runs' / 'quickstart' / 'distill'}\n"
    assert (tmp_path / "runs" / "quickstart" / "report.html").is_file()
    again = installed("report", "runs/quickstart", "-o", "page.html")
    assert again.stdout == f"{tmp_path / 'page.html'}\n", again.stderr
    assert installed("inspect", "runs/quickstart/distill").returncode == 0
