"""The command lines of the measurements: what they print, and what they refuse."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mambactl.errors import CheckError, ExitCode, ResourceError, UsageError
from mambactl.report.collect import collect
from tests.performance import command, eight_bits, kernels, loss, verification, verify

ROOT = Path(__file__).parents[2]
KEPT = json.loads((ROOT / "recipes" / "results" / "decode-h200.json").read_text("utf-8"))
SMALL = ["--device", "cpu", "--tokens", "40", "--hidden", "16", "--vocab", "300", "--iters", "1"]


def test_the_loss_on_its_own(capsys):
    result = loss.measure(loss.PARSER.parse_args(SMALL))
    row = result.metrics["loss"]
    assert (result.path, row["tokens"], row["hidden"], row["vocab"]) == (None, 40, 16, 300)
    assert row["milliseconds"] > 0
    assert max(row[key] for key in loss.ERRORS) < 1e-4
    shown = capsys.readouterr().err
    assert "40 x 16 x 300" in shown and "MiB beyond" in shown
    assert "ms for 40 tokens" in result.text


def test_sizes_of_the_loss_are_an_8b_models_unless_they_are_given():
    given = loss.PARSER.parse_args(["--vocab", "50"])
    assert loss.sizes(given, "cuda") == (8192, 4096, 50)
    assert loss.sizes(given, "cpu") == (512, 256, 50)


def test_one_line_on_stdout(tmp_path):
    line = [sys.executable, "-m", "tests.performance.loss", *SMALL, "--json"]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (printed,) = done.stdout.splitlines()
    found = json.loads(printed)
    assert list(found) == ["stage", "checkpoint", "metrics", "text"]
    about = ["device", "versions", "date", "dtype", "bandwidth_bytes_per_second", "config"]
    assert list(found["metrics"]) == [*about, "points", "loss"]
    assert found["metrics"]["config"] | {"tokens": 40, "iters": 1} == found["metrics"]["config"]
    assert "KL through a head of 40 x 16 x 300 on cpu in float32" in done.stderr
    file = tmp_path / "loss.json"
    file.write_text(printed)
    (entry,) = collect([file]).entries
    assert entry.metrics["loss"] == found["metrics"]["loss"]


def test_kernels_print_what_is_kept_of_them(monkeypatch, capfd):
    pytest.importorskip("triton")
    from tests.performance import recurrence

    kept = KEPT["sections"]["bench@kernels"]
    rows = {row["batch_size"]: row for row in kept["metrics"]["kernels"]}
    monkeypatch.setattr(verification, "require_kernels", lambda _: None)
    monkeypatch.setattr(recurrence, "contest", lambda batch, *_: rows[batch])
    given = kernels.PARSER.parse_args(["--device", "cpu", "--json"])
    assert command.run(kernels.measure, given) == ExitCode.DONE
    shown = capfd.readouterr()
    found = json.loads(shown.out)
    assert found["text"] == kept["text"] and found["metrics"]["kernels"] == list(rows.values())
    assert list(found["metrics"]) == list(kept["metrics"])
    assert "3.97x" in shown.err


def test_the_kernels_table(capsys):
    row = {"batch_size": 8, "ratio": 2.5}
    for way in ("fused", "snapshots"):
        row |= {f"{way}_microseconds": 10.0, f"{way}_bytes": 4e6, f"{way}_bytes_per_second": 4e11}
    kernels.show({"device": "gpu", "dtype": "bfloat16", "kernels": [row]})
    shown = capsys.readouterr().err
    assert "2.50x" in shown and "400" in shown and "Mamba-2 layer on gpu" in shown


@pytest.mark.parametrize(
    "draft",
    [pytest.param([], marks=pytest.mark.slow), ["--draft", "tiny-draft", "-k", "2"]],
)
def test_verification_stands_beside_the_speed_of_decoding(monkeypatch, capfd, draft):
    monkeypatch.setattr(verification, "require_kernels", lambda _: None)

    def pass_times(subject, context, rows, k, seed):
        # the real passes run on a GPU only
        return dict(zip(verification.NUMBERS, (k, 3.0, 2.0, 1.5), strict=True))

    monkeypatch.setattr(verification, "_measure", pass_times)
    asked = ["--synthetic", "tiny,tiny-mamba2", "--input-len", "8,16", "--output-len", "4"]
    given = verify.PARSER.parse_args([*asked, *draft, "--iters", "1", "--device", "cpu"])
    result = verify.measure(given)
    points = result.metrics["points"]
    assert [(point["model"], point["input_len"]) for point in points] == [
        ("tiny", 8), ("tiny", 16), ("tiny-mamba2", 8), ("tiny-mamba2", 16),
    ]  # fmt: skip
    assert all(point["decode_tokens_per_second"] > 0 for point in points)
    assert {point["verify_k"] for point in points} == {2 if draft else verification.REFERENCE_K}
    assert all(("speculative_tokens_per_second" in point) == bool(draft) for point in points)
    assert (result.path, result.text) == (None, "tiny,tiny-mamba2")
    shown = capfd.readouterr().err
    assert "verify" in shown and "1.50x" in shown
    assert ("accepted" in shown) == bool(draft)


@pytest.mark.parametrize(
    ("module", "arguments"),
    [(verify, ["--synthetic", "tiny"]), (kernels, []), (eight_bits, ["--weights", "int8"])],
)
def test_what_needs_a_gpu_says_so(module, arguments, capfd):
    given = module.PARSER.parse_args([*arguments, "--device", "cpu"])
    with pytest.raises(ResourceError, match="needs the GPU's decode kernels") as raised:
        module.measure(given)
    assert raised.value.code == 6
    assert command.run(module.measure, given) == 6
    shown = capfd.readouterr()
    assert shown.out == "" and "\nhint: mambactl doctor --deep\n" in shown.err
    assert "Traceback" not in shown.err


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        (kernels, ["--draft", "ngram"]),
        (kernels, ["--vocab", "50"]),
        (kernels, ["--synthetic", "tiny"]),
        (loss, ["--draft", "ngram"]),
        (loss, ["--tokens", "0"]),
        (loss, ["--vocab", "1"]),
    ],
)
def test_each_refuses_what_it_would_ignore(module, arguments, capsys):
    with pytest.raises(SystemExit) as raised:
        module.PARSER.parse_args(arguments)
    assert raised.value.code == ExitCode.USAGE
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["m", "--synthetic", "tiny"]])
def test_verification_takes_a_model_or_shapes(arguments):
    with pytest.raises(UsageError, match="one of them"):
        verify.measure(verify.PARSER.parse_args(arguments))


def test_options_are_checked_as_those_of_bench(capfd):
    given = verify.PARSER.parse_args(["--synthetic", "tiny", "--input-len", "8,0"])
    assert command.run(verify.measure, given) == ExitCode.USAGE
    assert "input-len: input should be greater" in capfd.readouterr().err


@pytest.mark.slow
def test_weights_of_8_bits_stand_beside_bf16(monkeypatch, capfd):
    pytest.importorskip("triton")
    from tests.performance import byte_products

    monkeypatch.setattr(verification, "require_kernels", lambda _: None)
    # graphs are a GPU's; what they run is not
    monkeypatch.setattr(byte_products, "capture", lambda run: run() or run)
    monkeypatch.setattr(byte_products, "median_seconds", lambda graphs: [2e-3, 1e-3])
    monkeypatch.setattr(byte_products, "DISTINCT_BYTES", 1.0)
    monkeypatch.setattr(eight_bits, "ROWS", (1, 5))
    asked = ["--synthetic", "tiny-hybrid", "--input-len", "8", "--output-len", "4", "--iters", "1"]
    given = eight_bits.PARSER.parse_args([*asked, "--device", "cpu", "--dtype", "float32"])
    result = eight_bits.measure(given)
    before, after = result.metrics["points"]
    rates = [point["decode_tokens_per_second"] for point in (before, after)]
    assert after["weights_gain"] == pytest.approx(rates[1] / rates[0])
    assert result.text == f"tiny-hybrid {rates[0]:.1f} -> {rates[1]:.1f} tokens/s"
    products = result.metrics["products"]
    assert [(each["product"], each["rows"]) for each in products] == [
        ("swiglu", 1), ("swiglu", 5), ("add_residual", 1), ("add_residual", 5),
    ]  # fmt: skip
    assert all(0 <= each["bytes_error"] < 2**-6 for each in products)
    assert all(each["bytes_us"] == pytest.approx(1000) for each in products)
    assert "products of tiny-hybrid" in capfd.readouterr().err


@pytest.mark.slow
def test_a_wrong_product_of_8_bits_fails(monkeypatch):
    pytest.importorskip("triton")
    from tests.performance import byte_products

    monkeypatch.setattr(byte_products, "capture", lambda run: run)
    monkeypatch.setattr(byte_products, "median_seconds", lambda graphs: [2e-3, 1e-3])
    monkeypatch.setattr(byte_products._Case, "error", lambda case: 0.5)
    with pytest.raises(CheckError, match="swiglu of 2 rows is off by 5.0e-01"):
        byte_products.products("tiny", (2,), 1e9, "fp8", torch.device("cpu"))
