"""Programs open a checkpoint by its path, in processes that do not import mambactl."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.consumers

TASK = """
task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""
ROWS = [{"question": "the old house", "choices": ["of light", "of stone"], "answer": 0}] * 2
LAUNCHED = """
import sys
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer
accelerator = Accelerator()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
ids = AutoTokenizer.from_pretrained(sys.argv[1])("the old house", return_tensors="pt").input_ids
losses = []
for _ in range(2):
    loss = model(ids, labels=ids).loss
    accelerator.backward(loss)
    optimizer.step()
    losses.append(float(loss))
print(losses[1] < losses[0])
"""
SHARDED = """
import sys
import torch
from transformers import AutoModelForCausalLM
plain = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
sharded = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, tp_plan="auto")
ids = torch.arange(4, 24)[None]
cut = [name for name, p in sharded.named_parameters() if type(p).__name__ == "DTensor"]
assert any("q_proj" in name for name in cut) and not any("mamba" in name for name in cut)
for options in ({"use_cache": True}, {"use_cache": False}):
    for training in (False, True):
        wanted, found = (m.train(training)(ids, **options).logits for m in (plain, sharded))
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
print("equal")
"""
PORT = 8719


@pytest.fixture(scope="module")
def student(save_student, tmp_path_factory) -> Path:
    """A checkpoint folder as `convert` makes one."""
    return save_student(tmp_path_factory.mktemp("consumers") / "student")


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """This process's, with the code of checkpoints kept in the test's own folder."""
    return os.environ | {
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_DATASETS_CACHE": str(tmp_path / "datasets"),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def program(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def run(line: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm-eval")
def test_lm_eval(student, environment, tmp_path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny.yaml").write_text(TASK.format(rows=rows))
    line = [program("lm_eval"), "--model", "hf", "--tasks", "tiny", "--device", "cpu"]
    line += ["--model_args", f"pretrained={student},trust_remote_code=True"]
    printed = run([*line, "--include_path", str(tmp_path / "tasks")], environment)
    assert "|tiny" in printed and "acc" in printed


def test_accelerate_launch(student, environment, tmp_path) -> None:
    script = tmp_path / "script.py"
    script.write_text(LAUNCHED)
    line = [program("accelerate"), "launch", "--cpu", "--num_processes", "1", str(script)]
    assert run([*line, str(student)], environment).splitlines()[-1] == "True"


def test_tensor_parallelism(student, environment, tmp_path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SHARDED)
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    assert run([*line, str(script), str(student)], environment).count("equal") == 2


@pytest.mark.skipif(find_spec("fastapi") is None, reason='needs "transformers[serving]"')
def test_transformers_serve(student, environment, tmp_path) -> None:
    line = [program("transformers"), "serve", "--trust-remote-code", "--port", str(PORT)]
    with running([*line, "--device", "cpu"], environment, tmp_path / "log") as log:
        asked = {
            "model": str(student),
            "messages": [{"role": "user", "content": "the old house"}],
            "max_tokens": 4,
        }
        address = f"http://127.0.0.1:{PORT}/v1/chat/completions"
        answer = post(address, asked, log)
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["usage"]["completion_tokens"] in range(1, 5)


@contextmanager
def running(line: list[str], environment: dict[str, str], log: Path) -> Iterator[Path]:
    """A program that runs during the block and prints into `log`."""
    with log.open("wb") as file:
        process = subprocess.Popen(line, stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        yield log
    finally:
        process.terminate()
        process.wait(timeout=30)


def post(address: str, content: dict, log: Path) -> dict:
    """The answer to a request, which is made again until somebody listens."""
    body = json.dumps(content).encode()
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    for _ in range(60):
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            pytest.fail(f"{error.read().decode()}\n{log.read_text()}")
        except urllib.error.URLError:
            time.sleep(1)
    pytest.fail(log.read_text())
