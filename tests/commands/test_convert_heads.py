"""`convert --by head`: some KV heads keep full attention, the others start as a window."""

import json
from pathlib import Path

import pytest
import torch
from conftest import write_sentences

from mambactl.checkpoint.contents import describe
from mambactl.checkpoint.load import load_model, open_checkpoint
from mambactl.cli.main import run as run_line
from mambactl.commands.convert import plan, run
from mambactl.conversion.choice import UNITS, rounded_half_up
from mambactl.errors import UsageError
from mambactl.evaluation.controls import ablated, windowed_attention
from mambactl.models.config import HybridConfig
from mambactl.options import ConvertConfig
from mambactl.options.fields import validated

WINDOW, SINKS, LENGTH = 5, 2, 48
KEPT = "0.1,1.0,1.1,2.0"
# what sees a window then, by layer
WINDOWED = {0: (0,), 2: (1,), 3: (0, 1)}


@pytest.fixture(scope="module")
def llama(save_llama) -> str:
    """A Llama of four layers and two KV heads in bf16, with biases."""
    return save_llama(torch.bfloat16, attention_bias=True)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    return write_sentences(tmp_path_factory.mktemp("text") / "fit.jsonl", 0, 60)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(3, 97, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def by_head(**fields) -> ConvertConfig:
    usual = {"by": "head", "window": WINDOW, "sinks": SINKS, "device": "cpu"}
    return ConvertConfig(**usual | fields)


def tensors(path: str | Path) -> dict[str, torch.Tensor]:
    with open_checkpoint(str(path)) as reader:
        return {name: reader.get(name).clone() for name in reader.names()}


def packed(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Two documents in every row."""
    return {"seq_idx": (torch.arange(LENGTH) >= 19).long().expand(len(ids), -1)}


@torch.no_grad()
def logits(path: str | Path, ids: torch.Tensor) -> torch.Tensor:
    return load_model(str(path), dtype=torch.float64)(ids, use_cache=False, **packed(ids)).logits


@pytest.mark.parametrize("out", ["t", "t.st"])
def test_the_student_is_its_control(llama, ids, out, tmp_path) -> None:
    metrics = run(by_head(keep_heads=KEPT), llama, tmp_path / out).metrics
    assert (metrics["replaced_heads"], metrics["kv_heads"]) == (4, 8)
    assert metrics["kept_heads"] == KEPT and metrics["attention_layers"] == [1]
    config = load_model(str(tmp_path / out)).config
    assert config.mixers == ["mamba2_mixed", "attention", "mamba2_mixed", "mamba2_window"]
    found = logits(tmp_path / out, ids)
    teacher = load_model(llama, dtype=torch.float64)
    with torch.no_grad(), windowed_attention(teacher, WINDOWED, WINDOW, SINKS):
        wanted = teacher(ids, use_cache=False, **packed(ids)).logits
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    assert float((found - logits(llama, ids)).abs().max()) > 0.1


def test_weights_of_both_groups_are_copied_bit_for_bit(llama, tmp_path) -> None:
    run(by_head(keep_heads=KEPT), llama, tmp_path / "t.st")
    source, made = tensors(llama), tensors(tmp_path / "t.st")
    for layer, head in ((0, 1), (2, 0)):
        before, after = f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.mamba."
        for name in ("q", "k", "v"):
            for kind in ("weight", "bias"):
                whole = source[f"{before}{name}_proj.{kind}"].unflatten(0, (2, -1))
                assert torch.equal(made[f"{after}attention.{name}_proj.{kind}"], whole[head])
                assert torch.equal(made[f"{after}window.{name}_proj.{kind}"], whole[1 - head])
        columns = source[f"{before}o_proj.weight"].unflatten(1, (2, -1))
        assert torch.equal(made[f"{after}attention.o_proj.weight"], columns[:, head])
        assert torch.equal(made[f"{after}window.o_proj.weight"], columns[:, 1 - head])
        assert torch.equal(made[f"{after}window.o_proj.bias"], source[f"{before}o_proj.bias"])
        assert f"{after}attention.o_proj.bias" not in made
        # two query heads of four have a recurrence
        assert made[f"{after}A_log"].shape == (2,)


def test_all_heads_or_none_are_layers_of_today(llama, tmp_path) -> None:
    """No head kept: the windowed layers of `--window`; all kept: the teacher's attention."""
    run(by_head(ratio=1), llama, tmp_path / "heads.st")
    layerwise = ConvertConfig(by="layer", ratio=1, window=WINDOW, sinks=SINKS)
    run(layerwise, llama, tmp_path / "layers.st")
    one, other = (tensors(tmp_path / f"{name}.st") for name in ("heads", "layers"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    configs = [load_model(str(tmp_path / f"{n}.st")).config for n in ("heads", "layers")]
    assert configs[0].to_dict() == configs[1].to_dict()
    run(by_head(ratio=0), llama, tmp_path / "all.st")
    made, source = tensors(tmp_path / "all.st"), tensors(llama)
    assert all(torch.equal(made[name], source[name]) for name in made)


def test_the_window_has_a_default(llama, tmp_path) -> None:
    metrics = run(ConvertConfig(), llama, tmp_path / "t.st").metrics
    assert metrics["window"] == {"window": 64, "sinks": 4}


def test_the_fit_brings_replaced_heads_nearer(llama, text, ids, tmp_path) -> None:
    fit = {"calibrate": [text], "max_length": LENGTH, "calibrate_tokens": 2048}
    keep = "0.1,1.0,1.1,2.0,2.1,3.0"
    result = run(by_head(keep_heads=keep, **fit), llama, tmp_path / "fit.st")
    assert result.metrics["calibration_error"] < 1
    made, source = tensors(tmp_path / "fit.st"), tensors(llama)
    columns = source["model.layers.0.self_attn.o_proj.weight"].unflatten(1, (2, -1))
    assert torch.equal(made["model.layers.0.mamba.attention.o_proj.weight"], columns[:, 1])
    student = load_model(str(tmp_path / "fit.st"), dtype=torch.float32)
    with torch.no_grad():
        whole = student(ids, use_cache=False).logits
        with ablated(student, "recurrent"):
            silent = student(ids, use_cache=False).logits
        with ablated(student, "attention"):
            deaf = student(ids, use_cache=False).logits
    assert float((whole - silent).abs().max()) > 1e-3 < float((whole - deaf).abs().max())


def test_mixers_are_taken_across_choices(llama, text, ids, tmp_path) -> None:
    fit = {"calibrate": [text], "max_length": LENGTH, "calibrate_tokens": 1024}
    run(by_head(ratio=1, **fit), llama, tmp_path / "all.st")
    aligned = str(tmp_path / "all.st")
    run(by_head(keep_heads="0.1,2.0", mixers_from=aligned), llama, tmp_path / "few.st")
    few = str(tmp_path / "few.st")
    run(by_head(keep_heads="0.1,2.0,3.1", mixers_from=few), llama, tmp_path / "more.st")
    run(by_head(keep_heads="0.1,2.0,3.1", mixers_from=aligned), llama, tmp_path / "direct.st")
    once, twice = (tensors(tmp_path / f"{name}.st") for name in ("direct", "more"))
    assert all(torch.equal(once[name], twice[name]) for name in once)
    # what is taken computes what it did: the recurrence of the heads of layer 0 that are replaced
    whole, part = (load_model(path, dtype=torch.float64) for path in (aligned, few))
    hidden, context = whole.model.enter(ids)
    with torch.no_grad():
        features = [m.model.layers[0].mixer.features(hidden, context) for m in (whole, part)]
    torch.testing.assert_close(features[1], features[0][..., :32], rtol=1e-9, atol=1e-9)
    with pytest.raises(UsageError, match="no mixer for the KV heads 0.1"):
        run(by_head(keep_heads="0.0,2.0", mixers_from=few), llama, tmp_path / "no.st")
    with pytest.raises(UsageError, match=f"window of {WINDOW} tokens"):
        run(by_head(keep_heads="0.1", mixers_from=aligned, window=9), llama, tmp_path / "no.st")
    assert not (tmp_path / "no.st").exists()


@pytest.mark.parametrize(
    ("ratio", "count", "replaced"),
    [(0.5, 90, 45), (0.35, 10, 4), (0.45, 10, 5), (0.25, 2, 1), (0.1, 4, 0), (1, 8, 8), (0, 8, 0)],
)
def test_halves_are_rounded_up(ratio, count, replaced) -> None:
    assert rounded_half_up(ratio, count) == replaced


def shape(layers: int, heads: int, kv_heads: int) -> HybridConfig:
    return HybridConfig(
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        head_dim=16, hidden_size=64, intermediate_size=64, vocab_size=32,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("shape_", "ratio", "kept"),
    [
        ((30, 9, 3), 0.5, 45), ((16, 32, 8), 0.75, 32), ((32, 32, 8), 0.875, 32),
        ((4, 4, 1), 0.5, 2), ((3, 4, 4), 0.9, 1),
    ],
)  # fmt: skip
def test_the_rule_keeps_the_share_in_the_middle(shape_, ratio, kept) -> None:
    base = shape(*shape_)
    chosen = UNITS["head"].chosen(ConvertConfig(by="head", ratio=ratio), base, 2)
    assert len(chosen) == len(set(chosen)) == kept
    depth = sum(unit.layer + 0.5 for unit in chosen) / kept / base.num_hidden_layers
    assert 0.4 < depth < 0.75
    assert 0 not in {unit.layer for unit in chosen}


def test_a_budget_counts_heads(llama, tmp_path) -> None:
    # keys and values of a head of 16 in bf16
    size = 2 * 16 * 2
    for budget, kept in ((0, 0), (3 * size + 1, 3), (10**6, 8)):
        planned = plan(by_head(kv_budget=budget), llama)
        assert planned["kv_heads"] - planned["replaced_heads"] == kept
        assert planned["cache"]["bytes_per_token"] == kept * size
        assert json.dumps(planned)


def test_sizes_are_known_before_and_after(llama, tmp_path) -> None:
    asked = by_head(keep_heads=KEPT)
    planned = plan(asked, llama)
    run(asked, llama, tmp_path / "t.st")
    found = describe(str(tmp_path / "t.st"))["cache"]
    assert found == planned["cache"]
    assert found["bytes_per_token"] == 4 * 2 * 16 * 2
    assert found["window_bytes"] == 4 * (WINDOW + SINKS) * 2 * 16 * 2
    # states of two query heads for each of four KV heads, and inputs of their convolutions
    states = 4 * 2 * 16 * 16 * 4
    inputs = 4 * 3 * (16 + 16 + 2 * 16) * 2
    assert found["bytes_per_sequence"] - found["window_bytes"] == states + inputs


@pytest.mark.parametrize(
    ("fields", "message", "hint"),
    [
        ({"keep_heads": "0.0,4.0"}, "no KV head 4.0", "0.0 to 3.1"),
        ({"keep_heads": "0.2"}, "no KV head 0.2", "0.0 to 3.1"),
        ({"keep_heads": "0.0,0.0"}, "names 0.0 twice", "0.0 to 3.1"),
        ({"keep_attention": [1]}, "--keep-attention chooses layers", "--keep-heads"),
        ({"by": "layer", "keep_heads": "0.0"}, "--keep-heads chooses KV heads", "--by head"),
        ({"mixer": "mamba1"}, "--by head does not go with --mixer mamba1", "--mixer mamba2"),
        ({"mixer": "mamba2_mixed"}, "no mixer 'mamba2_mixed'", "mamba2"),
        ({"init": "reference", "window": None}, "--by head starts as the attention", "drop"),
        (
            {"keep_heads": "0.0", "select": "kl", "select_data": ["x"]},
            "--keep-heads leaves nothing to select", "drop it",
        ),
    ],
)  # fmt: skip
def test_what_is_refused(llama, fields, message, hint, tmp_path) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        run(by_head(**fields), llama, tmp_path / "t.st")
    assert hint in raised.value.hint
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("value", [18.2, 3, [18.2, 8.0], [3, 1]])
def test_numbers_are_no_heads(value) -> None:
    with pytest.raises(UsageError, match="one quoted string, '18.2,8.0'"):
        validated("convert", ConvertConfig, {"by": "head", "keep_heads": value})


@pytest.mark.parametrize("value", ["3", "a.b", "1.2.3", "1.", "-1.0", "1.0,,2.0"])
def test_other_words_are_no_heads(value) -> None:
    with pytest.raises(UsageError, match="write KV heads as 18.2,8.0"):
        validated("convert", ConvertConfig, {"by": "head", "keep_heads": value})


def test_recipes_give_heads_as_one_quoted_string(llama, tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    for value, code in (("'0.1, 1.0'", 0), ("0.1", 2), ("[0.1, 1.0]", 2)):
        body = f"stages:\n  convert: {{model: {llama}, by: head, keep_heads: {value}}}\n"
        (tmp_path / "r.yaml").write_text(body)
        assert run_line(["convert", llama, "-r", "r.yaml", "-o", "t.st", "--dry-run"]) == code
        err = capfd.readouterr().err
        assert ("one quoted string" in err) == (code == 2)


def test_a_model_with_kept_heads_is_converted_further(llama, tmp_path) -> None:
    first, second = tmp_path / "a.st", tmp_path / "b.st"
    run(by_head(keep_heads="0.1,1.0,1.1,2.0,2.1,3.0,3.1"), llama, first)
    metrics = run(by_head(keep_heads="1.1,3.0,3.1"), str(first), second).metrics
    config = load_model(str(second)).config
    assert config.attention_heads == {0: (1,), 1: (1,), 2: (), 3: (0, 1)}
    assert (metrics["replaced_heads"], metrics["kept_heads"]) == (3, "0.1,1.1,3.0,3.1")
    with pytest.raises(UsageError, match=f"windows of {WINDOW} tokens"):
        run(by_head(window=9), str(first), tmp_path / "no.st")
