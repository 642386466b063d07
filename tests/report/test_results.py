"""Where measurements are kept."""

from mambactl.report.results import LONGEST_NAME, file_name


def test_long_lists_of_tasks_have_files_of_their_own() -> None:
    tasks = [f"task_number_{n}" for n in range(20)]
    names = [file_name("eval", "+".join(tasks[:count])) for count in (3, 18, 19, 20)]
    assert (
        len(set(names)) == 4 and names[0] == "eval-task_number_0+task_number_1+task_number_2.json"
    )
    assert all(len(name) <= LONGEST_NAME + len(".json") for name in names)
    assert names[1] == file_name("eval", "+".join(tasks[:18]))
