"""Files that count as those whose functions run."""

import importlib
import sys
import threading

import pytest
from performance.recorder import Recorder

MODULES = {
    "__init__": "def unused():\n    return 1\n",
    "data": "TABLE = [n for n in range(3)]\nclass Row:\n    size = sum(n for n in TABLE)\n",
    "names": "def name(n):\n    return str(n)\nNAMES = [name(n) for n in range(3)]\n",
    "rows": "class Row:\n    def size(self):\n        return 1\n",
    "short": "size = lambda: 1\n",
    "stream": "def numbers():\n    yield 1\n    yield 2\n",
    "work": "def work(done):\n    done.append(1)\n",
}
WAYS = ["trace", "monitoring"] if hasattr(sys, "monitoring") else ["trace"]


@pytest.mark.parametrize("way", WAYS)
def test_functions_count_and_what_an_import_runs_does_not(monkeypatch, tmp_path, way) -> None:
    package = tmp_path / f"counted_by_{way}"
    package.mkdir()
    for name, source in MODULES.items():
        (package / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = sys.gettrace()
    with Recorder(package, way == "monitoring") as recorder:
        loaded = {
            name: importlib.import_module(f"{package.name}.{name}")
            for name in MODULES
            if name != "__init__"
        }
        numbers = loaded["stream"].numbers()
        next(numbers)
        loaded["rows"].Row().size()
        recorder.in_step = True
        # begun before the step
        next(numbers)
        loaded["short"].size()
        done = []
        thread = threading.Thread(target=loaded["work"].work, args=(done,))
        thread.start()
        thread.join()
        recorder.in_step = False
    assert done and sys.gettrace() is before
    # `name` is a function, though an import calls it
    counted = ["names", "rows", "short", "stream", "work"]
    assert recorder.files(recorder.whole) == [f"{package.name}/{n}.py" for n in counted]
    assert recorder.files(recorder.step) == [
        f"{package.name}/{n}.py" for n in ("short", "stream", "work")
    ]
