"""Files in which measurements are kept."""

import json

from mambactl.evaluation.probes import EvalConfig
from mambactl.report.results import LONGEST_NAME, file_name, save_results


def test_long_lists_of_tasks_have_files_of_their_own() -> None:
    tasks = [f"task_number_{n}" for n in range(20)]
    names = [file_name("eval", "+".join(tasks[:count])) for count in (3, 18, 19, 20)]
    assert (
        len(set(names)) == 4 and names[0] == "eval-task_number_0+task_number_1+task_number_2.json"
    )
    assert all(len(name) <= LONGEST_NAME + len(".json") for name in names)
    assert names[1] == file_name("eval", "+".join(tasks[:18]))


def test_a_card_that_cannot_be_written_loses_no_numbers(save_student, tmp_path, capsys) -> None:
    folder = save_student(tmp_path / "m")
    (folder / "README.md").write_bytes(b"\xff\xfe no text")
    config = EvalConfig(data=["x"], device="cpu")
    kept = save_results("eval", str(folder), "x", config, {"kl": 0.5})
    assert json.loads(kept.read_text())["metrics"] == {"kl": 0.5}
    assert f"warning: {folder / 'README.md'} is not written (Unicode" in capsys.readouterr().err
