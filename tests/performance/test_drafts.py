"""Numbers of the script that measures drafts."""

import json

import pytest

from mambactl.options import DraftConfig


@pytest.fixture(scope="module")
def pair(tmp_path_factory, save_student, random_texts):
    from mambactl.commands.draft import run

    folder = tmp_path_factory.mktemp("drafts")
    target, draft = str(save_student(folder / "t")), folder / "d.st"
    given = {"max_length": 48, "answer_tokens": 12, "vocabulary": 50, "batch_size": 2}
    config = DraftConfig(device="cpu", data=[str(random_texts)], max_steps=3, unroll=2, **given)
    run(config, target, draft)
    return target, str(draft)


def test_shares_of_steps_by_accepted_draft() -> None:
    from tests.performance.drafts import by_position

    assert by_position({0: 5, 1: 3, 3: 2, 5: 0}, 10) == [0.5, 0.2, 0.2]
    assert by_position({}, 0) == []


def test_a_row_for_each_category_and_one_for_all(pair, tmp_path, capfd) -> None:
    from tests.performance import command, drafts

    rows = [{"category": name, "turns": [f"w{n} w5", "later"]} for n, name in enumerate("aabb")]
    prompts = tmp_path / "some.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--target", pair[0], "--draft", pair[1], "--prompts", str(prompts), "--device", "cpu"]
    words += ["--max-new-tokens", "8", "-k", "2", "--limit", "1", "--check", "--json"]
    assert command.run(drafts.measure, drafts.PARSER.parse_args(words)) == 0
    shown = capfd.readouterr()
    found = json.loads(shown.out)["metrics"]["runs"]
    assert [each["category"] for each in found] == ["some: a", "some: b", "all"] * 2
    assert [each["temperature"] for each in found] == [0.0] * 3 + [1.0] * 3
    for each in found:
        assert 1 <= each["tokens_per_step"] <= 3 and each["speedup"] > 0
        assert each["prompts"] == (2 if each["category"] == "all" else 1)
    assert "tok/step" in shown.err
