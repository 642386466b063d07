"""Commands with `--device-map` on two devices, against the same commands on one."""

import json
from collections.abc import Callable
from inspect import unwrap
from pathlib import Path

import pytest
import torch
from conftest import WORDS
from fixtures.two_devices import KIND
from safetensors.torch import load_file

from mambactl.commands import convert, eval, generate, teacher_cache
from mambactl.evaluation import fidelity, layers, likelihood
from mambactl.evaluation.probes import EvalConfig
from mambactl.models.device_map import DeviceMap, Rooms
from mambactl.options import ConvertConfig, GenerateConfig, TeacherCacheConfig
from mambactl.train import job


@pytest.fixture
def mapped(monkeypatch, request) -> Callable[[], list[int]]:
    """mapped(): every model is spread over two devices from now on; the devices of each."""

    def begin() -> list[int]:
        seen: list[int] = []
        devices = request.getfixturevalue("two_devices")
        rooms = Rooms(dict.fromkeys(devices, 10**9), balanced=True)
        settle = DeviceMap.settle

        def noted(self, model) -> None:
            settle(self, model)
            seen.append(len(self.devices))

        monkeypatch.setattr(DeviceMap, "settle", noted)
        monkeypatch.setattr(Rooms, "of", lambda config: config.device_map and rooms)
        monkeypatch.setattr(job, "placement", lambda config: (devices[0], torch.float32))
        for limits in (likelihood.TOKENS, likelihood.HEAD_POSITIONS):
            monkeypatch.setitem(limits, KIND, limits["cpu"])
        # the tensors of these devices are none of inference mode
        for module, name in ((fidelity, "predict"), (layers, "layer_errors")):
            plain = torch.no_grad()(unwrap(getattr(module, name)))
            monkeypatch.setattr(module, name, plain)
        return seen

    return begin


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch) -> None:
    """The devices of this test alone."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_answers_to_a_data_set(mapped, tiny_llama_dir, tmp_path) -> None:
    rows = [{"prompt": " ".join(WORDS[3 : 4 + n])} for n in range(5)]
    data = tmp_path / "p.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    outs = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    given = {
        "dataset": [str(data)], "max_new_tokens": 6, "batch_size": 2, "keep_unfinished": True,
        "dtype": "float32",
    }  # fmt: skip
    generate.run(GenerateConfig(**given), str(tiny_llama_dir), outs[0])
    seen = mapped()
    generate.run(GenerateConfig(**given, device_map="auto"), str(tiny_llama_dir), outs[1])
    assert seen == [2]
    assert outs[0].read_text() == outs[1].read_text()


def test_measurements(mapped, save_student, random_texts, tmp_path) -> None:
    student = str(save_student(tmp_path / "student"))
    given = {
        "data": [str(random_texts)], "limit": 6, "max_length": 32, "batch_size": 2,
        "control": "window", "control_window": 6, "ablate": ["recurrent"], "per_layer": True,
        "recall": [64], "recall_rows": 2,
    }  # fmt: skip
    one = eval.run(EvalConfig(**given), student).metrics
    seen = mapped()
    two = eval.run(EvalConfig(**given, device_map="auto"), student).metrics
    # student and teacher
    assert seen == [2, 2]
    (name,) = one["fidelity"]
    for which, values in one["fidelity"][name].items():
        found = two["fidelity"][name][which]
        if isinstance(values, float):
            assert found == pytest.approx(values, rel=1e-2, abs=1e-5), which
    assert two["recall"].keys() == one["recall"].keys()


def test_cached_samples_of_a_teacher(mapped, random_texts, tiny_llama_dir, tmp_path) -> None:
    given = {"data": [str(random_texts)], "max_steps": 3, "batch_size": 2, "max_length": 32}
    teacher_cache.run(TeacherCacheConfig(**given), str(tiny_llama_dir), tmp_path / "one")
    seen = mapped()
    config = TeacherCacheConfig(**given, device_map="auto")
    teacher_cache.run(config, str(tiny_llama_dir), tmp_path / "two")
    assert seen == [2]
    one, two = (samples(tmp_path / name) for name in ("one", "two"))
    assert torch.equal(one["ids"], two["ids"])


def samples(folder: Path) -> dict[str, torch.Tensor]:
    """The only file of a cache."""
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize("by", ["head", pytest.param("layer", marks=pytest.mark.slow)])
def test_what_keeps_attention(mapped, random_texts, tiny_llama_dir, tmp_path, by) -> None:
    given = {
        "by": by, "select": "kl", "calibrate": [str(random_texts)], "calibrate_tokens": 512,
        "select_tokens": 64, "max_length": 32, "device": "auto",
    }  # fmt: skip
    one = convert.run(ConvertConfig(**given), str(tiny_llama_dir), tmp_path / "one.st")
    seen = mapped()
    config = ConvertConfig(**given, device_map="auto")
    two = convert.run(config, str(tiny_llama_dir), tmp_path / "two.st")
    assert seen == [2]
    assert two.metrics["selection"]["ranking"] == one.metrics["selection"]["ranking"]
    found, wanted = (load_file(tmp_path / f"{name}.st") for name in ("two", "one"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())
