"""Recipe files: parsing, references, overrides, and every recipe that the project ships."""

import json
import re
from pathlib import Path

import pytest

from mambactl import recipes
from mambactl.errors import UsageError
from mambactl.recipe import STAGES

SHIPPED = sorted(recipes.recipe_folder().glob("*.yaml"))


def write(folder: Path, text: str) -> Path:
    path = folder / "r.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid_and_named_like_their_file(path) -> None:
    recipe = recipes.load_recipe(path)
    assert recipe.name == path.stem
    assert recipe.description
    # the first line is the command that runs it
    assert path.read_text().startswith(f"# mambactl recipe run {path.stem}")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_files_that_shipped_recipes_name_exist(path) -> None:
    text = path.read_text()
    for name in re.findall(r"[\w./-]+\.(?:jsonl|txt)\b", text):
        assert (path.parent / name).is_file(), name


def test_there_is_a_quick_start() -> None:
    assert "quickstart" in [path.stem for path in SHIPPED]


def test_sections_labels_and_references(tmp_path) -> None:
    (tmp_path / "x.jsonl").write_text("{}")
    path = write(
        tmp_path,
        """
        seed: 3
        stages:
          convert: {model: m, ratio: 0.25, out: student.st}
          eval@ours: {data: x.jsonl}
          spec-decode@back: {target: m, draft: "${convert}", seed: 5}
        """,
    )
    convert, ours, back = recipes.load_recipe(path).sections
    assert (convert.out, convert.writes, ours.writes) == ("student.st", True, False)
    assert ours.stage == "eval"
    assert ours.values == {"seed": 3, "data": str(tmp_path / "x.jsonl")}
    assert (back.model, back.values["seed"]) == ("m", 5)
    assert recipes.substitute(back.values["draft"], {"convert": "/s.st"}) == "/s.st"


def test_settings_override_one_section(tmp_path) -> None:
    path = write(tmp_path, "stages: {convert: {model: m}, eval@a: {}, eval@b: {}}")
    settings = ["eval@b.limit=3", "convert.model=n"]
    convert, a, b = recipes.load_recipe(path, settings).sections
    assert (convert.model, a.values, b.values) == ("n", {}, {"limit": 3})


def test_shapes_and_kernels_need_no_model(tmp_path) -> None:
    text = "stages: {bench@a: {synthetic: tiny}, bench@b: {kernels: true}, convert: {model: m}}"
    a, b, convert = recipes.load_recipe(write(tmp_path, text)).sections
    assert (a.model, a.needs_model, b.needs_model, convert.needs_model) == (
        None,
        False,
        False,
        True,
    )
    with pytest.raises(UsageError, match="bench has no model"):
        recipes.load_recipe(write(tmp_path, "stages: {bench: {synthetic: [], k: 3}}"))


@pytest.mark.parametrize(
    ("text", "sentence", "hint"),
    [
        ("stages: {convret: {model: m}}", "convret is not a stage", "convert"),
        ("stages: {convert: {model: m, ratoi: 1}}", "no option ratoi", "ratio"),
        ("stages: {convert: {model: m, ratio: 2}}", "ratio", "--help"),
        ("stages: {convert: {ratio: 1}}", "convert has no model", "model"),
        ("stages: {bench: {model: m, synthetic: tiny}}", "works without a model", "model"),
        ("stages: {convert: {model: m}, eval: {teacher: '${sft}'}}", "${sft}", "convert"),
        ("stages: {eval: {model: '${eval}'}}", "${eval}", "none"),
        ("stages: []", "`stages`", None),
        ("stagse: {}", "unknown key stagse", "stages"),
        ("stages: {convert: 3}", "mapping", None),
        ("- a", "not a recipe", None),
        ("a: [", "not valid YAML", None),
    ],
)
def test_bad_recipes_say_what_is_wrong(tmp_path, text, sentence, hint) -> None:
    with pytest.raises(UsageError) as caught:
        recipes.load_recipe(write(tmp_path, text))
    assert sentence in str(caught.value)
    assert hint is None or hint in str(caught.value.hint)


def test_settings_are_typed_like_yaml() -> None:
    settings = ["a-b=1", "c=[1, 2]", "d=null", "e=x=y", "f=2e-3", "g=a: b: c"]
    assert recipes.parse_settings(settings) == {
        "a_b": 1,
        "c": [1, 2],
        "d": None,
        "e": "x=y",
        "f": "2e-3",
        "g": "a: b: c",
    }
    assert recipes.configure("distill", {"lr": "2e-3"}).lr == 2e-3


def test_every_option_says_what_it_is() -> None:
    for stage, config in STAGES.items():
        for name, field in config.model_fields.items():
            assert field.description, f"{stage}.{name}"


def test_schema_holds_every_option_of_every_stage() -> None:
    sections = recipes.schema()["properties"]["stages"]["patternProperties"]
    patterns = {pattern: set(body["properties"]) for pattern, body in sections.items()}
    for stage, config in STAGES.items():
        matching = [names for pattern, names in patterns.items() if re.match(pattern, stage)]
        assert len(matching) == 1
        assert set(config.model_fields) <= matching[0]
    assert json.dumps(recipes.schema())
