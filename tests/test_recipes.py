"""Recipe files: parsing, references, overrides, and every recipe that the project ships."""

import json
import re
from pathlib import Path

import pytest

from mambactl import recipe_schema, recipes
from mambactl.commands import COMMANDS, configure, stages
from mambactl.errors import UsageError
from mambactl.files import recipe_folder
from mambactl.options.fields import flags, parse_settings

SHIPPED = sorted(recipe_folder().glob("*.yaml"))


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


def test_shapes_need_no_model(tmp_path) -> None:
    text = "stages: {bench@a: {synthetic: tiny}, bench@b: {synthetic: [tiny]}, convert: {model: m}}"
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
    assert parse_settings(settings) == {
        "a_b": 1,
        "c": [1, 2],
        "d": None,
        "e": "x=y",
        "f": "2e-3",
        "g": "a: b: c",
    }
    assert configure("distill", {"lr": "2e-3"}).lr == 2e-3


def test_options_are_typed_again_as_flags() -> None:
    convert = configure("convert", {"keep_attention": [1, 2], "rotary": True, "ratio": 0.5})
    assert flags(convert) == ["--keep-attention", "1", "--keep-attention", "2", "--rotary"]
    assert flags(configure("distill", {"packing": False})) == ["--no-packing"]


def test_every_option_says_what_it_is() -> None:
    for command in COMMANDS.values():
        for name, field in command.options.model_fields.items():
            assert field.description, f"{command.name}.{name}"


def test_schema_holds_every_option_of_every_stage() -> None:
    sections = recipe_schema.schema()["properties"]["stages"]["patternProperties"]
    patterns = {pattern: set(body["properties"]) for pattern, body in sections.items()}
    for stage, command in stages().items():
        matching = [names for pattern, names in patterns.items() if re.match(pattern, stage)]
        assert len(matching) == 1
        assert set(command.options.model_fields) <= matching[0]
    assert json.dumps(recipe_schema.schema())


VARIANTS = [
    f"{path.stem}@{name}" for path in SHIPPED for name in recipes.load_recipe(path).variants
]


@pytest.mark.parametrize("spec", VARIANTS)
def test_shipped_variants_are_valid_and_described(spec) -> None:
    recipe = recipes.load_recipe(spec)
    assert recipe.name == spec and recipe.description
    assert recipes.load_recipe(recipe.spec) == recipe
    # what it says about its share is what the last conversion makes
    kind, _, share = spec.rpartition("@")[2].rpartition("-")
    conversions = [section for section in recipe.sections if section.stage == "convert"]
    assert conversions[-1].values["ratio"] == pytest.approx(float(share) / 100)
    # mixers that are taken have the form of those that were aligned
    for options in (section.config for section in conversions):
        assert (options.form, options.by, options.window, options.init) == FORMS[kind]


# kind of variant -> form, by, window and init of its conversions
FORMS = {
    "": (None, None, None, "calibrated"),
    "window": (None, "layer", 64, "calibrated"),
    "state": ("portable", None, None, "calibrated"),
    "paper": ("portable", None, None, "reference"),
}


def test_every_model_has_every_share_and_the_papers_way() -> None:
    shares = ["50", "75", "87.5", "100"]
    papers = [f"paper-{share}" for share in shares]
    for name in ("llama3-8b", "llama3.1-8b", "llama3.2-1b", "llama3.2-3b", "zephyr-7b"):
        assert recipes.load_recipe(name).variants == (*shares, *papers), name
    others = [f"{kind}-{share}" for kind in ("paper", "window", "state") for share in shares]
    heads = ["50", "75", "87.5", "93.3", "100"]
    assert recipes.load_recipe("smollm2-135m").variants == (*heads, *others)


def test_the_papers_order_is_that_of_its_code() -> None:
    recipe = recipes.load_recipe("zephyr-7b@paper-100")
    assert [section.key for section in recipe.sections][:9] == [
        "convert", "distill", "sft", "convert@75", "sft@75", "convert@87.5", "sft@87.5",
        "convert@100", "sft@100",
    ]  # fmt: skip
    distill = recipe.section("distill").values
    assert (distill["stages"], distill["lr"], distill["grad_clip"]) == (["stepwise"], 8e-5, 0.1)
    assert (recipe.section("sft").values["lr"], recipe.section("dpo").values["beta"]) == (
        2e-5,
        0.01,
    )


VARIED = """
stages:
  convert: {model: m, ratio: 0.5}
  eval: {limit: 3, seed: 1}
  bench: {}
variants:
  a: {convert: {ratio: 0.75}, sft: {lr: 1.0e-5}, bench: null}
  b: {like: a, description: the second, eval: {limit: 4}, sft: {warmup: 3}}
"""


def test_variants_change_drop_and_add_sections(tmp_path) -> None:
    path = write(tmp_path, VARIED)
    base, a, b = (recipes.load_recipe(f"{path}{at}") for at in ("", "@a", "@b"))
    assert base.variants == ("a", "b") and base.spec == str(path)
    assert [s.key for s in base.sections] == ["convert", "eval", "bench"]
    assert [s.key for s in a.sections] == ["convert", "sft", "eval"]
    assert [s.key for s in b.sections] == ["convert", "sft", "eval"]
    convert, sft, evaluation = b.sections
    assert (convert.model, convert.values) == ("m", {"ratio": 0.75})
    assert sft.values == {"lr": 1e-5, "warmup": 3}
    assert evaluation.values == {"limit": 4, "seed": 1}
    assert (b.name, b.description, b.spec) == ("r@b", "the second", f"{path}@b")
    settings = ["eval.limit=9"]
    assert recipes.load_recipe(f"{path}@b", settings).section("eval").values["limit"] == 9


def test_a_path_may_hold_an_at_of_its_own(tmp_path) -> None:
    folder = tmp_path / "x@y"
    folder.mkdir()
    path = write(folder, VARIED)
    assert recipes.load_recipe(path).variant is None
    assert recipes.load_recipe(f"{path}@a").variant == "a"


@pytest.mark.parametrize(
    ("variants", "sentence", "hint"),
    [
        ("{}", "no variant c", "no variants"),
        ("{d: {}}", "no variant c", "d"),
        ("{c: {like: c}}", "is like itself", "c -> c"),
        ("{c: {like: d}}", "no variant d", "c"),
        ("{c: {evla: {}}}", "evla is not a stage", "eval"),
        ("{c: 3}", "must be a mapping", None),
        ("[c]", "must map names", None),
    ],
)
def test_bad_variants_say_what_is_wrong(tmp_path, variants, sentence, hint) -> None:
    path = write(tmp_path, f"stages: {{convert: {{model: m}}}}\nvariants: {variants}")
    with pytest.raises(UsageError) as caught:
        recipes.load_recipe(f"{path}@c")
    assert sentence in str(caught.value)
    assert hint is None or hint in str(caught.value.hint)


def test_patterns_and_folders_of_data_lie_beside_the_recipe(tmp_path) -> None:
    (tmp_path / "saved").mkdir()
    (tmp_path / "part-1.jsonl").touch()
    data = ["part-*.jsonl=0.5", "saved@train=1", "org/set@train=2"]
    path = write(tmp_path, f"stages:\n  sft: {{model: x, data: {json.dumps(data)}}}\n")
    (section,) = recipes.load_recipe(path).sections
    inside = [f"{tmp_path}/part-*.jsonl=0.5", f"{tmp_path}/saved@train=1"]
    assert section.values["data"] == [*inside, "org/set@train=2"]
