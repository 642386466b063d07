"""The code beside the weights: other programs load by it, mambactl writes it and never runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import mambactl
from mambactl.checkpoint.contents import describe
from mambactl.checkpoint.load import load_lineage, load_model, load_tokenizer
from mambactl.checkpoint.save import save_model
from mambactl.models.hybrid import HybridConfig, HybridForCausalLM
from mambactl.registration import AUTO_MAP, STUB, STUB_TEXT

# a process that has not imported mambactl, first as if it were not installed
OPENING = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "mambactl":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline
path = sys.argv[1]
try:
    AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
except ImportError as error:
    print(error)
sys.meta_path.pop(0)
assert not [name for name in sys.modules if name.startswith("mambactl")]
try:
    AutoConfig.from_pretrained(path, trust_remote_code=False)
except ValueError as error:
    print("trust_remote_code" in str(error))
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
print(type(model).__module__, type(model).__name__, model.origin.lineage["stage"])
print(type(AutoModel.from_pretrained(path, trust_remote_code=True)).__name__)
text = pipeline("text-generation", path, trust_remote_code=True)
print(text("the old house", max_new_tokens=4, do_sample=False)[0]["generated_text"][:13])
model.save_pretrained(sys.argv[2])
"""
MARKING = """
from pathlib import Path
Path({marker!r}).touch()
from mambactl.models.hybrid import HybridConfig, HybridForCausalLM, HybridModel
"""


@pytest.fixture
def marked(save_student, tmp_path) -> tuple[Path, Path]:
    """A student whose code leaves a file where it runs, and that file."""
    folder, marker = save_student(tmp_path / "student"), tmp_path / "ran"
    (folder / STUB).write_text(MARKING.format(marker=str(marker)))
    return folder, marker


def test_other_programs_open_a_checkpoint_by_its_path(save_student, tmp_path) -> None:
    folder = save_student(tmp_path / "student")
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", OPENING, str(folder), str(tmp_path / "again")],
        capture_output=True, text=True, timeout=300, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    without, asked, classes, base, text = done.stdout.splitlines()
    assert "pip install mambactl" in without
    assert asked == "True"
    assert classes == "mambactl.models.hybrid HybridForCausalLM convert"
    assert base == "HybridModel"
    assert text == "the old house"
    # what was saved there has the same code, and no copy of the package
    assert {path.name for path in (tmp_path / "again").glob("*.py")} == {STUB}
    assert (tmp_path / "again" / STUB).read_text() == STUB_TEXT
    assert load_lineage(str(tmp_path / "again"))["stage"] == "save_pretrained"


def test_mambactl_does_not_run_it(marked, tmp_path) -> None:
    folder, marker = marked
    load_model(str(folder), trust_remote_code=True)
    load_tokenizer(str(folder), trust_remote_code=True)
    describe(str(folder))
    # where mambactl is imported, transformers has the classes already
    AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(mambactl.errors.ModelError):
        load_tokenizer(str(folder), trust_remote_code=True)
    assert not marker.exists()


def test_it_is_not_copied_from_a_source(marked, tmp_path) -> None:
    folder, marker = marked
    made = mambactl.convert(str(folder), tmp_path / "made", ratio=1.0)
    assert (Path(made.path) / STUB).read_text() == STUB_TEXT
    assert not marker.exists()


def test_a_configuration_names_our_classes_alone(make_hybrid, tmp_path) -> None:
    model = make_hybrid(["mamba2", "attention"])
    out = save_model(model, tmp_path / "m", {}, None)
    written = json.loads((out / "config.json").read_text())
    assert written["architectures"] == ["HybridForCausalLM"]
    assert written["auto_map"] == AUTO_MAP
    # of a file that names others, or that an earlier version wrote
    foreign = {"AutoModelForCausalLM": "somebody/else--modeling.Model"}
    for found in (written | {"auto_map": foreign}, {**written, "auto_map": None}):
        config = HybridConfig.from_dict(found)
        assert config.auto_map == AUTO_MAP
        assert config.to_dict()["auto_map"] == AUTO_MAP
    del written["architectures"]
    assert HybridConfig.from_dict(written).architectures == ["HybridForCausalLM"]


@pytest.mark.parametrize("ending", ["", ".st"])
@pytest.mark.parametrize("loader", ["transformers", "mambactl"])
def test_saving_keeps_lineage_and_card(save_student, tmp_path, loader, ending) -> None:
    if ending and loader == "transformers":
        pytest.skip("a single file is for mambactl")
    source = save_student(tmp_path / f"student{ending}")
    before = load_lineage(str(source))
    if loader == "mambactl":
        model = load_model(str(source))
    else:
        model = HybridForCausalLM.from_pretrained(source)
    model.save_pretrained(tmp_path / "again")
    record = load_lineage(str(tmp_path / "again"))
    assert record["stage"] == "save_pretrained"
    assert record["parent"]["path"] == str(source)
    assert (record["source"], record["teacher"]) == (before["source"], before["teacher"])
    assert [link["stage"] for link in record["ancestors"]] == ["convert"]
    card = (tmp_path / "again" / "README.md").read_text()
    assert "Made by `mambactl convert`" in card
    if not ending:
        assert card == (source / "README.md").read_text()
    load_model(str(tmp_path / "again"))


def test_a_model_that_came_from_nowhere_has_no_lineage(make_hybrid, tmp_path) -> None:
    make_hybrid(["mamba2"]).save_pretrained(tmp_path)
    assert not (tmp_path / "mambactl.json").exists()
    (tmp_path / "mambactl.json").write_text('{"schema": "odd"}')
    HybridForCausalLM.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / "mambactl.json").exists()


def test_lineage_comes_from_the_cache_of_a_hub(save_student, tmp_path) -> None:
    commit = "0" * 40
    cached = tmp_path / "hub" / "models--org--student"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    (cached / "snapshots").mkdir()
    source = save_student(cached / "snapshots" / commit)
    model = AutoModelForCausalLM.from_pretrained("org/student", cache_dir=tmp_path / "hub")
    model.save_pretrained(tmp_path / "again")
    assert load_lineage(str(tmp_path / "again"))["ancestors"][-1]["stage"] == "convert"
    assert (tmp_path / "again" / "README.md").read_text() == (source / "README.md").read_text()
