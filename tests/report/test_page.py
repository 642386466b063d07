"""Pages made of results and ledgers: complete, well-formed, escaped, traceable, on their own."""

import json
import re
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import pytest
from report_page import PHONE, browser, in_a_browser
from report_results import fidelity, result

from mambactl.errors import UsageError
from mambactl.report import charts
from mambactl.report.collect import collect
from mambactl.report.entries import read_entries
from mambactl.report.needles import needle_maps
from mambactl.report.page import MARKS, write_report
from mambactl.report.summary import summarise

pytest.importorskip("matplotlib")
KEPT = Path(__file__).parents[2] / "recipes" / "results"
VOID = {"meta", "link", "br", "path", "use", "rect", "hr", "img", "col"}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Everything a page can show, of two models with names that HTML and mathtext would read."""
    tmp_path = tmp_path_factory.mktemp("kept")
    probes = {
        f"kv-{n}": {"recall": 0.5, "chance": 0.01, "teacher": {"recall": 0.9}} for n in (256, 512)
    }
    points = [
        {
            "input_len": n, "batch_size": rows, "decode_tokens_per_second": 100.0 * rows,
            "decode_byte_limit": 150.0 * rows, "decode_share": 2 / 3, "cache_bytes": rows * n * 512,
            "speculative_tokens_per_second": 200.0 * rows, "k": 3,
        }
        for n in (128, 1024) for rows in (1, 8)
    ]  # fmt: skip
    contents = {
        "a": result(
            "runs/<b>A</b> & co", fidelity={"held": fidelity(0.25)}, recall=probes,
            tasks={"piqa": {"acc": 0.6, "acc_stderr": 0.02}},
            controls={"window 64+4": {"fidelity": {"held": fidelity(0.5)}},
                      "no recurrent": {"fidelity": {"held": fidelity(9.0)}}},
        ),
        "b": result("runs/$x_1$", fidelity={"held": fidelity(0.125)},
                    needle={"lengths": [512, 1024], "depths": [0.0, 0.5, 1.0],
                            "scores": [[1, 1, 0], [0.25, 0, 1]]}),
        "speed": result("runs/$x_1$", points=points, dtype="float32", config={"draft": "ngram"}),
        "drafts": result("runs/$x_1$", draft="ngram", k=3, acceptance=0.4, tokens_per_step=2.0,
                         speculative={"accepted_histogram": {"0": 3, "10": 1, "2": 4}}),
    }  # fmt: skip
    paths = []
    for name, content in contents.items():
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps(content), "utf-8")
    lines = [{"phase": "logits", "step": n, "tokens": 1000 * n, "loss": 1 / (n + 1), "kl": 0.5}
             for n in range(1, 9)]  # fmt: skip
    paths.append(tmp_path / "c.st.metrics.jsonl")
    paths[-1].write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return paths


@pytest.fixture(scope="module")
def page(kept, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    write_report(kept, folder / "page.html", "mambactl report <x>")
    assert [path.name for path in folder.iterdir()] == ["page.html"]
    return (folder / "page.html").read_text("utf-8")


class Parsed(HTMLParser):
    """Tags that are open, all ids and links, and the text of every cell."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.tags = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for key, value in attrs if key == "id"]
        self.links += [value for key, value in attrs if key in ("href", "src")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag


def test_the_page_is_well_formed_and_stands_alone(page) -> None:
    found = Parsed(page)
    assert len(set(found.ids)) == len(found.ids)
    assert {link for link in found.links if not link.startswith("#")} == {"data:,"}
    assert {link[1:] for link in found.links if link.startswith("#")} <= set(found.ids)
    assert not re.search(r"https?:|@import|<script .|xmlns", page)
    assert set(re.findall(r"url\((.)", page)) <= {"#"}
    # colours of charts are those of the page, in light and in dark
    assert "var(--c0)" in page and "prefers-color-scheme: dark" in page and "@media print" in page
    used = set(re.findall(r"var\((--\w+)\)", page))
    assert used <= set(re.findall(r"(--\w+):", page))
    drawn = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    fixed = set(re.findall(r"(?:fill|stroke): (#\w+)", re.sub(r"QuadMesh.*?</g>", "", drawn)))
    assert not {each for each in fixed if each.startswith(("#12ab", "#34cd", "#000000"))}


def test_names_are_text(page) -> None:
    assert "&lt;b&gt;A&lt;/b&gt; &amp; co" in page and "<b>A</b>" not in page
    assert "$x_1$" in page and "mambactl report &lt;x&gt;" in page


def test_every_section_is_there_and_names_its_sources(page, kept) -> None:
    sections = dict(re.findall(r'<section id="(\w+)">(.*?)</section>', page, flags=re.DOTALL))
    assert list(sections) == [
        "kept", "summary", "fidelity", "controls", "training", "recall", "needle", "tasks", "speed",
        "memory", "drafts", "sources",
    ]  # fmt: skip
    by_section = {
        "controls": "a.json", "training": "c.st.metrics.jsonl", "needle": "b.json",
        "speed": "speed.json", "drafts": "drafts.json", "tasks": "a.json",
    }  # fmt: skip
    files = re.findall(r'<li id="source-(\d+)"><code>(.*?)</code>', sections["sources"])
    for name, file in by_section.items():
        cited = re.findall(r'href="#source-(\d+)"', sections[name].rpartition("Sources:")[2])
        assert file in {Path(path).name for number, path in files if number in cited}, name
    for path in kept:
        assert str(path) in sections["sources"]
    for known in ("--data &#39;a b.jsonl&#39;", "d1g3st", "2026-11-24T10", "mambactl 0.1.0", "cpu"):
        assert known in sections["sources"]
    # every row of every table ends with the number of a source
    rows = re.findall(r"<tbody>(.*?)</tbody>", page, flags=re.DOTALL)
    for row in re.findall(r"<tr.*?</tr>", "".join(rows), flags=re.DOTALL):
        last = re.findall(r"<td.*?</td>", row, flags=re.DOTALL)[-1]
        assert re.search(r'href="#source-\d+"', last), row


def test_numbers_intervals_and_the_best(page) -> None:
    summary = re.search(r'<section id="summary">(.*?)</section>', page, re.DOTALL)[1]
    summary = re.sub(r' data-label="[^"]*"', "", summary)
    assert 'class="best">0.1250 <small>0.1150 to 0.1450</small>' in summary
    assert "<td>0.2500 <small>0.2400 to 0.2700</small>" in summary
    assert "60.0 % <small>56.1 % to 63.9 %</small>" in summary
    kinds = re.findall(r'<tr class="(\w+)">\s*<th scope="row">(.*?)</th>', summary)
    # a table for each data set: models with their controls below, then teacher and guessing
    assert [kind for kind, _ in kinds][:4] == ["model", "control", "control", "model"]
    assert kinds[1][1] == "window 64+4" and ("reference", "guessing") in kinds
    assert "is computed from shapes" in summary and "Indented below a model" in summary
    assert "2.00" in summary  # MiB of cache at 4096 tokens: 1 + 4096 * 256 / 2^20


def test_histograms_are_in_the_order_of_numbers(page) -> None:
    drafts = re.search(r'<section id="drafts">(.*?)</section>', page, re.DOTALL)[1]
    rows = re.findall(r'<th scope="row">(\d+)</th>\s*<td[^>]*>([\d,]+)</td>', drafts)
    assert rows == [("0", "3"), ("2", "4"), ("10", "1")]


def test_charts_have_words_and_tables_have_scopes(page) -> None:
    found = Parsed(page)
    pictures = [attrs for tag, attrs in found.tags if attrs.get("role") == "img"]
    assert len(pictures) == page.count("<svg") > 8
    assert all(len(attrs["aria-label"]) > 10 for attrs in pictures)
    assert {attrs.get("scope") for tag, attrs in found.tags if tag == "th"} == {"col", "row"}
    assert page.count("<caption>") == page.count("<table>")


def test_charts_can_be_read_on_both_papers() -> None:
    style = files("mambactl.report").joinpath("page.html").read_text("utf-8")

    def luminance(text):
        parts = [int(text[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    themes = re.findall(r":root \{(.*?)\}", style, flags=re.DOTALL)[:2]
    asked = {"ink": 7, "soft": 4.5, "link": 4.5} | {f"c{n}": 3 for n in range(8)}
    for theme in themes:
        colours = dict(re.findall(r"--(\w+): (#\w{6})", theme))
        for paper in ("paper", "panel"):
            for name, least in asked.items():
                ends = sorted((luminance(colours[name]), luminance(colours[paper])))
                assert (ends[1] + 0.05) / (ends[0] + 0.05) >= least, (name, paper)


def test_numbers_without_a_place_on_paper_are_left_out_of_charts(tmp_path) -> None:
    broken = fidelity(float("inf")) | {"perplexity_ratio": float("nan")}
    content = result("m", fidelity={"held": broken}, controls={"w": {"fidelity": {"held": broken}}})
    (tmp_path / "a.json").write_text(json.dumps(content), "utf-8")
    write_report([tmp_path / "a.json"], tmp_path / "page.html", "x")
    text = (tmp_path / "page.html").read_text("utf-8")
    assert ">inf" in text and ">nan" in text
    assert not re.search(r'd="[^"]*(inf|nan)', text)


def test_many_models_never_look_alike() -> None:
    looks = {(charts.colour(n), charts.marker(n)) for n in range(50)}
    assert len(looks) == 50 and len(MARKS) == len(charts.MARKERS)


# times of kernels, in which there is no model
OF_NO_MODEL = {"packages-h200"}
OF_MODELS = sorted(path for path in KEPT.glob("*.json") if path.stem not in OF_NO_MODEL)


@pytest.mark.parametrize("file", OF_MODELS, ids=lambda path: path.stem)
def test_what_is_kept_in_the_repository_is_read(file, tmp_path) -> None:
    entries = list(read_entries(file))
    assert entries
    write_report([file], tmp_path / "page.html", "mambactl report")
    text = (tmp_path / "page.html").read_text("utf-8")
    Parsed(text)
    for entry in entries:
        for numbers in (entry.metrics.get("fidelity") or {}).values():
            assert f"{numbers['kl']:.4f}" in text


def test_commands_of_sections_and_of_runs_are_found() -> None:
    speeds = list(read_entries(KEPT / "decode-h200.json"))
    assert all(entry.source.command.startswith("mambactl bench") for entry in speeds)
    assert "--synthetic mamba-2.8b" in speeds[0].source.command
    runs = {entry.model: entry for entry in read_entries(KEPT / "smollm2-135m-distill-h200.json")}
    assert "eval d75.st" in runs["75 % replaced"].source.command
    assert runs["75 % replaced"].source.member == "runs[3]"


def test_a_ledger_says_how_its_model_was_trained(tmp_path) -> None:
    lineage = {
        "schema": 1, "stage": "distill", "created": "2026-11-24T09:00:00+00:00",
        "parent": {"path": "runs/p"},
        "recipe": {"seed": 0, "max_steps": 10, "data": ["a b.jsonl"], "lr": 3e-4},
        "versions": {"torch": "2.13"},
    }  # fmt: skip
    safetensors = pytest.importorskip("safetensors.numpy")
    text = json.dumps(lineage)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mambactl.json").write_text(text, "utf-8")
    metadata = {"mambactl.json": text}
    safetensors.save_file({}, tmp_path / "b.st", metadata=metadata)
    line = json.dumps({"phase": "logits", "step": 1, "tokens": 5, "kl": 0.5}) + "\n"
    for name in ("a/metrics.jsonl", "b.st.metrics.jsonl", "c.partial.jsonl"):
        (tmp_path / name).write_text(line, "utf-8")
    paths = [tmp_path / name for name in ("a", "b.st", "c.partial.jsonl")]
    sources = [ledger.source for ledger in collect(paths).ledgers]
    # what is at its default goes without saying
    wanted = "mambactl distill runs/p --set max_steps=10 --set 'data=[\"a b.jsonl\"]'"
    assert [source.command for source in sources] == [wanted, wanted, ""]
    assert ("date", "2026-11-24T09:00:00+00:00") in sources[1].details


def test_needle_maps_are_found_and_turned() -> None:
    axes = {"lengths": [8, 16], "depths": [0.0, 0.5, 1.0]}
    (plain,) = needle_maps({**axes, "scores": [[1, 1, 0], [0, 0, 1]]})
    (turned,) = needle_maps({**axes, "scores": [[1, 0], [1, 0], [0, 1]]})
    assert plain == turned and plain.shares == [[1, 1, 0], [0, 0, 1]]
    nested = {
        **axes,
        "student": {"rouge1": [[50, 100, 0], [0, 0, 100]], "answers": [["a"] * 3] * 2},
    }
    (own,) = needle_maps(nested)
    assert own.name == "student rouge1" and own.shares[0] == [0.5, 1, 0]


def test_long_rows_needles_of_teachers_and_paired_tests(tmp_path) -> None:
    axes = {"lengths": [8, 16], "depths": [0.0, 1.0], "scoring": "argmax"}
    maps = {who: {"retrieved": [[1.0, 0.0], [0.0, 0.0]], "mean_retrieved": 0.25}
            for who in ("student", "teacher")}  # fmt: skip
    test = {"difference": -0.25, "interval": [-0.3, -0.2], "p": 0.001}
    metrics = {
        "fidelity": {"held": fidelity(0.25)}, "needle": {**axes, **maps},
        "long_context": {"books": {"rows": 2, "max_length": 8192, "student": fidelity(0.75)}},
        "against": {"model": "runs/old", "fidelity": {"held": fidelity(0.5)},
                    "tests": {"held": {"tests": {"kl": test}}}},
    }  # fmt: skip
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text(json.dumps(result(name, **metrics)), "utf-8")
    write_report(sorted(tmp_path.glob("*.json")), tmp_path / "page.html", "x")
    text = (tmp_path / "page.html").read_text("utf-8")
    titles = re.findall(r"<figcaption><b>(.*?)</b>", text)
    wanted = ["a retrieved", "teacher llama retrieved", "b retrieved"]
    assert [title for title in titles if "retrieved" in title] == wanted
    assert "KL by position, books in rows of 8,192, 1,000 tokens" in titles
    assert "against old" in text and "-0.2500" in text and "-0.3000 to -0.2000" in text


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.json", "{", "not valid JSON"),
        ("a.json", "{}", "holds no measurement"),
        ("a.json", None, "cannot be used .No such file"),
        ("a.jsonl", "[]", "no ledger"),
        ("folder", None, "nothing measured is kept beside"),
        ("a.jsonl", '{"phase": "align", "step": 1, "loss": 1, "tokens": 1}', "nothing measured"),
    ],
)
def test_what_cannot_be_shown_is_a_sentence(tmp_path, name, text, sentence) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=sentence):
        write_report([tmp_path / name], tmp_path / "page.html", "x")
    assert not (tmp_path / "page.html").exists()


def test_the_template_is_part_of_the_package() -> None:
    assert files("mambactl.report").joinpath("page.html").is_file()


CHROMIUM = pytest.mark.skipif(browser() is None, reason="no Chromium on this machine")


@CHROMIUM
@pytest.mark.parametrize(("width", "dark"), [(PHONE, True), (1280, False)])
def test_a_browser_shows_it_without_errors_or_requests(page, tmp_path, width, dark) -> None:
    found = in_a_browser(page, tmp_path, width, dark)
    assert found["dark"] is dark and found["cut"] == []
    assert found["errors"] == [] and found["requests"] == []
    assert found["width"] == width and found["scrolls"] <= width, found["wide"]
    assert found["charts"] == page.count("<svg") and found["empty"] == 0


@CHROMIUM
def test_the_browser_sees_what_is_wrong(tmp_path) -> None:
    broken = (
        '<!DOCTYPE html><body><p style="width: 900px">wide</p><svg width="20" height="9"></svg>'
        '<img src="http://127.0.0.1:9/x.png"><script>nothing.there()</script>'
    )
    found = in_a_browser(broken, tmp_path, PHONE)
    assert found["scrolls"] >= 900 and "width: 900px" in found["wide"][0]
    assert found["requests"] == ["http://127.0.0.1:9/x.png"] and found["empty"] == 1
    assert "nothing is not defined" in " ".join(found["errors"])


def test_what_eval_keeps_of_layers_preferences_texts_and_groups_is_shown(tmp_path) -> None:
    pairs = {
        "pairs": 40,
        "reward_accuracy": 0.625,
        "reward_margin": 1.5,
        "kl_to_reference": 0.03125,
    }
    texts = {"prompts": 7, "forced_agreement": 0.75, "prefix_share": 0.5, "exact_match": 0.25}
    calibrated = fidelity(0.25) | {"ece": 0.0625, "teacher_ece": 0.03, "ece_to_teacher": 0.02}
    metrics = {
        "fidelity": {"held": calibrated}, "layers": {"held": {"9": 0.5, "10": 0.875}},
        "against": {"model": "runs/old.st", "fidelity": {"held": fidelity(0.5)},
                    "layers": {"held": {"9": 0.4375}}, "tests": {}},
        "preferences": {"harmless": pairs}, "generation": {"generation": texts},
        "tasks": {
            "mmlu": {"acc": 0.5, "acc_stderr": 0.01}, "mmlu_law": {"acc": 0.75},
            "gsm8k": {"exact_match:strict": 0.25, "exact_match_stderr:strict": 0.02},
            "wikitext": {"word_perplexity": 20.5},
            "paper-zeroshot": {"PIQA": 0.625, "average": 0.5625},
        },
        "task_groups": {"mmlu": ["mmlu_law"]},
    }  # fmt: skip
    file = tmp_path / "a.json"
    file.write_text(json.dumps(result("a", **metrics)), "utf-8")
    write_report([file], tmp_path / "page.html", "x")
    text = (tmp_path / "page.html").read_text("utf-8")
    for key in ("layers", "preferences", "generation", "tasks"):
        assert f'<section id="{key}">' in text
    for shown in ("62.5 %", "0.0312", "0.0625", "75.0 %", "0.8750", "0.4375", "20.5000"):
        assert f">{shown}<" in text
    # 1.96 errors of the extracted answers around them
    assert "21.1 % to 28.9 %" in text and "2050" not in text
    columns = {column.heading for column in summarise(collect([file]).entries).columns}
    assert {"mmlu acc", "gsm8k exact_match:strict", "paper-zeroshot average"} <= columns
    assert "mmlu_law acc" not in columns and "mmlu_law" in text
    # the other student, with its own numbers
    assert '<th scope="row">old.st</th>' in text
