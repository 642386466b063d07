"""The script that measures students on their own text, on models small enough for a CPU."""

import json

import pytest

from tests.performance import command, own_text


@pytest.mark.parametrize(
    ("answer", "loops"),
    [
        ([1, 2, 3, 4] * 4, True),
        ([1, 2, 3, 4] * 3 + [1, 2, 3], False),
        ([5] * 7, True),
        ([5] * 6, False),
        ([1, 2], False),
    ],
)
def test_four_equal_runs_of_four_tokens_are_a_loop(answer, loops) -> None:
    assert own_text.repeats(answer) is loops


def test_a_student_that_is_its_teacher_differs_by_nothing(
    save_student, tiny_llama_dir, tmp_path, capfd
) -> None:
    teacher, other = str(tiny_llama_dir), str(save_student(tmp_path / "student"))
    chats = tmp_path / "chats.jsonl"
    turns = [[{"role": "user", "content": f"w{n} w5"}] for n in range(6)]
    chats.write_text("".join(json.dumps({"messages": each}) + "\n" for each in turns))
    words = [f"same={teacher}", f"other={other}", "--teacher", teacher, "--data", str(chats)]
    words += ["--tokens", "9", "--batch-size", "4", "--device", "cpu", "--dtype", "float32"]
    given = own_text.PARSER.parse_args([*words, "--json"])
    assert command.run(own_text.measure, given) == 0
    said = capfd.readouterr()
    found = json.loads(said.out)["metrics"]["students"]
    # each was told of as soon as it was measured
    for name, numbers in found.items():
        assert f"{name}: {json.dumps(numbers)}" in said.err
    assert found["same"]["reverse_kl"] == 0 and found["same"] == found["teacher"]
    assert found["other"]["reverse_kl"] > 0.01 and found["other"]["agreement"] < 1
    for each in found.values():
        # prompts are not counted, and the end token is written
        assert each["answers"] == 6 and 6 <= each["tokens"] <= 6 * 9
    low, high = found["other"]["reverse_kl_interval"]
    assert low <= found["other"]["reverse_kl"] <= high
