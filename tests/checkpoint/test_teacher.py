"""A teacher chosen by the lineage of a checkpoint: its weights, named before they are read."""

import json
from pathlib import Path

import pytest
from conftest import write_sentences

from mambactl.checkpoint import teacher
from mambactl.checkpoint.teacher import teacher_of
from mambactl.commands.eval import plan
from mambactl.errors import ModelError, UsageError
from mambactl.evaluation.probes import EvalConfig

OPTION = "--teacher"
RECORD = {"schema": 1, "stage": "convert"}


def folder(path: Path, **files: str) -> Path:
    """A folder of files, whose names have _ for the dot."""
    path.mkdir(parents=True)
    for name, content in files.items():
        stem, _, suffix = name.rpartition("_")
        (path / f"{stem}.{suffix}").write_text(content)
    return path


def student(path: Path, **lineage: object) -> str:
    """A folder that is nothing but a lineage."""
    return str(folder(path, mambactl_json=json.dumps(RECORD | lineage)))


@pytest.fixture
def weights(tmp_path) -> Path:
    return folder(tmp_path / "weights", model_safetensors="", config_json='{"model_type": "llama"}')


def test_the_teacher_is_named_before_it_is_looked_for(tmp_path, weights, capsys) -> None:
    made = student(tmp_path / "s", teacher=str(weights), source="unused")
    assert teacher_of(made, None, OPTION) == str(weights)
    assert capsys.readouterr().err == f"teacher: {weights} (lineage of {made})\n"
    gone = student(tmp_path / "t", source=str(tmp_path / "gone"))
    with pytest.raises(ModelError, match="cannot be found") as caught:
        teacher_of(gone, None, OPTION)
    assert OPTION in caught.value.hint
    assert f"teacher: {tmp_path / 'gone'} (lineage of {gone})" in capsys.readouterr().err


def test_a_teacher_that_is_given_overrides_the_lineage(tmp_path, weights, capsys) -> None:
    made = student(tmp_path / "s", teacher="/dev/zero")
    assert teacher_of(made, str(weights), OPTION) == str(weights)
    assert capsys.readouterr().err == ""


def test_without_a_lineage_the_option_is_named(tmp_path, weights) -> None:
    with pytest.raises(UsageError) as caught:
        teacher_of(str(weights), None, OPTION)
    assert OPTION in caught.value.hint


def test_a_lineage_leads_to_no_pickle(tmp_path) -> None:
    pickle = folder(tmp_path / "p", pytorch_model_bin="", config_json="{}")
    made = student(tmp_path / "s", source=str(pickle))
    with pytest.raises(ModelError, match="is a pickle") as caught:
        teacher_of(made, None, OPTION)
    assert OPTION in caught.value.hint
    # a person may
    assert teacher_of(made, str(pickle), OPTION) == str(pickle)
    (pickle / "model.safetensors").touch()
    assert teacher_of(made, None, OPTION) == str(pickle)


def test_a_lineage_leads_to_no_device_and_no_other_file(tmp_path) -> None:
    (tmp_path / "x.bin").touch()
    for number, path in enumerate(["/dev/zero", "/etc/passwd", str(tmp_path / "x.bin")]):
        made = student(tmp_path / str(number), teacher=path)
        with pytest.raises(ModelError, match="not a checkpoint"):
            teacher_of(made, None, OPTION)


@pytest.mark.parametrize("name", [3, ["a"], {"a": 1}, "a\nerror: b", "\x1b[2J"])
def test_a_name_that_is_no_path_is_refused(tmp_path, name, capsys) -> None:
    with pytest.raises(ModelError):
        teacher_of(student(tmp_path / "s", teacher=name), None, OPTION)
    assert "teacher:" not in capsys.readouterr().err


def test_a_checkpoint_of_the_hub_names_no_path_of_this_machine(
    tmp_path, weights, monkeypatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    fetched = tmp_path / "hub" / "models--o--n" / "snapshots" / "1"
    made = student(fetched, teacher=str(weights))
    for name in (str(weights), "./weights", "weights", "~"):
        (fetched / "mambactl.json").write_text(
            json.dumps({"schema": 1, "stage": "convert", "teacher": name})
        )
        with pytest.raises(ModelError, match="a path of this machine") as caught:
            teacher_of(made, None, OPTION)
        assert OPTION in caught.value.hint
    # names of the hub are looked for there
    asked: list[str] = []
    real = teacher.resolve

    def resolve(spec: str):
        asked.append(spec)
        return real(made if spec in ("llama3-8b", "o/n") else spec)

    monkeypatch.setattr(teacher, "resolve", resolve)
    for name in ("llama3-8b", "o/n"):
        (fetched / "mambactl.json").write_text(
            json.dumps({"schema": 1, "stage": "convert", "teacher": name})
        )
        assert teacher_of(made, None, OPTION) == name
    assert asked[-1] == "o/n"


AUTO = {"auto_map": {"AutoModelForCausalLM": "m.M", "AutoTokenizer": ["t.T", None]}}


@pytest.mark.parametrize(
    ("config", "tokenizer", "refused"),
    [
        ({"model_type": "odd", **AUTO}, {}, True),
        ({"model_type": "llama"}, AUTO, True),
        ({"model_type": "llama", **AUTO}, {}, False),
    ],
)
def test_trust_is_for_models_that_a_person_names(tmp_path, config, tokenizer, refused) -> None:
    ships = folder(
        tmp_path / "code",
        model_safetensors="",
        config_json=json.dumps(config),
        tokenizer_config_json=json.dumps(tokenizer),
    )
    made = student(tmp_path / "s", teacher=str(ships))
    assert teacher_of(made, None, OPTION) == str(ships)
    assert teacher_of(made, str(ships), OPTION, trusted=True) == str(ships)
    if not refused:
        assert teacher_of(made, None, OPTION, trusted=True) == str(ships)
        return
    with pytest.raises(ModelError, match="ships code of its own"):
        teacher_of(made, None, OPTION, trusted=True)


def test_options_in_a_lineage_are_not_taken(tmp_path, save_student, tiny_llama_dir, capsys) -> None:
    text_file = write_sentences(tmp_path / "x.jsonl", 0, 4)
    made = save_student(tmp_path / "student")
    record = json.loads((made / "mambactl.json").read_text())
    options = {"trust_remote_code": True, "limit": 1, "max_length": 17, "teacher": "/dev/zero"}
    (made / "mambactl.json").write_text(json.dumps({**record, **options, "recipe": options}))
    with pytest.raises(ModelError, match="not a checkpoint"):
        plan(EvalConfig(data=[text_file], device="cpu"), str(made))
    record |= {"recipe": options, "trust_remote_code": True}
    (made / "mambactl.json").write_text(json.dumps(record))
    found = plan(EvalConfig(data=[text_file], device="cpu"), str(made))
    assert found["teacher"] == str(tiny_llama_dir)
    assert capsys.readouterr().err.count(f"teacher: {tiny_llama_dir} (lineage of {made})\n") == 1
