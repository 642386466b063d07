"""The `convert` stage: what is copied stays as it was, bit for bit; the rest is as asked."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import write_sentences
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from mambactl.checkpoint.load import load_lineage, load_model, load_tokenizer, open_checkpoint
from mambactl.commands import convert
from mambactl.commands.convert import plan, run
from mambactl.errors import CheckError, ModelError, OutputError, UsageError
from mambactl.models.mixers.mamba2 import Mamba2Spec
from mambactl.options import ConvertConfig

INITS, MIXERS = ("calibrated", "reference"), ("mamba2", "mamba1")
LENGTH = 64


@pytest.fixture(scope="module")
def llama(save_llama) -> str:
    return save_llama(torch.bfloat16)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    return write_sentences(tmp_path_factory.mktemp("text") / "fit.jsonl", 0, 80)


def portable(**fields) -> ConvertConfig:
    """A state alone in whole layers, which most of these tests are about."""
    return ConvertConfig(form="portable", **fields)


def calibrated(text: str, **fields) -> ConvertConfig:
    return portable(calibrate=[text], max_length=LENGTH, **fields)


def tensors(path: str | Path) -> dict[str, torch.Tensor]:
    with open_checkpoint(str(path)) as reader:
        return {name: reader.get(name).clone() for name in reader.names()}


def assert_copied(source: dict, made: dict, replaced: list[int]) -> None:
    """Every tensor the hybrid shares with its source, and the rows that attention gave."""
    gone = {name for name in source if name not in made}
    assert gone == {
        name for name in source if "self_attn" in name and int(name.split(".")[2]) in replaced
    }
    for name in source.keys() & made.keys():
        assert made[name].dtype == source[name].dtype, name
        assert torch.equal(made[name], source[name]), name
    for layer in replaced:
        prefix = f"model.layers.{layer}"
        attention = {n: source[f"{prefix}.self_attn.{n}_proj.weight"] for n in "qkvo"}
        in_proj = made[f"{prefix}.mamba.in_proj.weight"]
        gate = attention["q"].shape[0]
        rows = torch.cat([attention[n] for n in "vkq"])
        assert torch.equal(in_proj[gate : gate + len(rows)], rows)
        assert torch.equal(made[f"{prefix}.mamba.out_proj.weight"], attention["o"])


@pytest.mark.parametrize("ratio", [0, 0.5, 1])
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("out", ["hybrid", "hybrid.st"])
def test_copied_tensors_are_bit_equal(llama, out, mixer, init, ratio, tmp_path) -> None:
    result = run(portable(ratio=ratio, mixer=mixer, init=init), llama, tmp_path / out)
    assert result.path == str(tmp_path / out)
    assert [path.name for path in tmp_path.iterdir()] == [out]
    replaced = {0: [], 0.5: [0, 2], 1: [0, 1, 2, 3]}[ratio]
    assert result.metrics["replaced_layers"] == replaced
    made = tensors(tmp_path / out)
    assert_copied(tensors(llama), made, replaced)
    kept_wide = {name for name in made if name.endswith(("A_log", ".D", "dt_bias"))}
    assert len(kept_wide) == len(replaced) * (3 if mixer == "mamba2" else 2)
    for name, tensor in made.items():
        assert tensor.dtype == (torch.float32 if name in kept_wide else torch.bfloat16), name
    model = load_model(str(tmp_path / out), dtype=torch.float32)
    assert model.config.mixers == [mixer if i in replaced else "attention" for i in range(4)]
    ids = torch.arange(3, 12)[None]
    longer = model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=-1)
    assert longer.shape == (1, 12) and bool(model(ids).logits.isfinite().all())
    tokenizer = load_tokenizer(str(tmp_path / out))
    assert tokenizer.chat_template == load_tokenizer(llama).chat_template


def test_ratio_zero_computes_what_the_source_does(llama, tmp_path) -> None:
    run(portable(ratio=0), llama, tmp_path / "same.st")
    ids = torch.arange(3, 40)[None]
    made, source = (load_model(path)(ids).logits for path in (str(tmp_path / "same.st"), llama))
    assert torch.equal(made, source)


def test_layers_to_keep_are_kept(llama, tmp_path) -> None:
    config = portable(keep_attention="3,1")
    result = run(config, llama, tmp_path / "t.st")
    assert result.metrics == {"replaced_layers": [0, 2], "attention_layers": [1, 3]}
    assert_copied(tensors(llama), tensors(tmp_path / "t.st"), [0, 2])


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("first", MIXERS)
@pytest.mark.parametrize("second", MIXERS)
def test_a_hybrid_can_lose_more_attention(llama, init, first, second, tmp_path) -> None:
    half, most = tmp_path / "half.st", tmp_path / "most"
    run(portable(init=init, mixer=first), llama, half)
    run(portable(init=init, mixer=second, keep_attention=[3], seed=5), str(half), most)
    made = tensors(most)
    assert_copied(tensors(half), made, [1])
    assert load_model(str(most)).config.mixers == [first, second, first, "attention"]
    lineage = load_lineage(str(most))
    assert [entry["stage"] for entry in lineage["ancestors"]] == ["convert"]
    assert (lineage["source"], lineage["seed"]) == (llama, 5)
    assert lineage["parent"]["path"] == str(half) and len(lineage["parent"]["sha256"]) == 64


@pytest.mark.parametrize("mixer", MIXERS)
def test_layers_of_a_kind_share_one_form(llama, mixer, tmp_path) -> None:
    run(portable(init="reference", mixer=mixer), llama, tmp_path / "half.st")
    config = portable(ratio=1, mixer=mixer)
    with pytest.raises(UsageError, match=f"the {mixer} layers .* another form") as raised:
        run(config, str(tmp_path / "half.st"), tmp_path / "all.st")
    assert "--init" in raised.value.hint
    # nothing to replace, nothing to refuse
    run(portable(keep_attention=[1, 3], mixer=mixer), str(tmp_path / "half.st"), tmp_path / "s")


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("mixer", MIXERS)
def test_attention_biases_are_copied(save_llama, mixer, init, tmp_path) -> None:
    source = save_llama(attention_bias=True, mlp_bias=True)
    run(portable(ratio=1, mixer=mixer, init=init), source, tmp_path / "t")
    given, made = tensors(source), tensors(tmp_path / "t")
    assert_copied(given, made, [0, 1, 2, 3])
    for layer in range(4):
        prefix = f"model.layers.{layer}"
        bias = {n: given[f"{prefix}.self_attn.{n}_proj.bias"] for n in "qkvo"}
        rows = torch.cat([bias[n] for n in "vkq"])
        assert float(rows.std()) > 0.2
        assert torch.equal(made[f"{prefix}.mamba.in_proj.bias"][64 : 64 + len(rows)], rows)
        assert torch.equal(made[f"{prefix}.mamba.out_proj.bias"], bias["o"])
    assert bool(load_model(str(tmp_path / "t"))(torch.arange(9)[None]).logits.isfinite().all())


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_another_type_on_disk(llama, dtype, tmp_path) -> None:
    run(portable(dtype=dtype), llama, tmp_path / "t")
    kinds = {
        name.rsplit(".", 1)[-1]: tensor.dtype for name, tensor in tensors(tmp_path / "t").items()
    }
    assert kinds["A_log"] == kinds["D"] == kinds["dt_bias"] == torch.float32
    assert kinds["weight"] == kinds["bias"] == getattr(torch, dtype)
    assert json.loads((tmp_path / "t" / "config.json").read_text())["dtype"] == dtype


@pytest.mark.parametrize("out", ["t", "t.st"])
def test_lineage_says_how_it_was_made(llama, out, tmp_path) -> None:
    config = portable(seed=7, ratio=0.25, mixer="mamba1")
    result = run(config, llama, tmp_path / out)
    lineage = load_lineage(result.path)
    assert (lineage["stage"], lineage["source"], lineage["seed"]) == ("convert", llama, 7)
    assert lineage["recipe"] == config.model_dump(mode="json") | {"by": "layer"}
    assert lineage["metrics"] == result.metrics
    assert result.metrics == {"replaced_layers": [0], "attention_layers": [1, 2, 3]}
    assert lineage["ancestors"] == [] and lineage["teacher"] is None


def test_a_relative_source_is_recorded_in_full(llama, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(Path(llama).parent)
    run(portable(), "llama", tmp_path / "t.st")
    assert load_lineage(str(tmp_path / "t.st"))["source"] == llama


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_seed_decides_every_bit(llama, text, mixer, init, tmp_path) -> None:
    def weights(name: str, seed: int) -> bytes:
        data = [text] if init == "calibrated" else []
        config = portable(
            init=init, mixer=mixer, seed=seed, calibrate=data, max_length=LENGTH,
            calibrate_tokens=512,
        )  # fmt: skip
        # other random numbers in between must not matter
        torch.manual_seed(len(name))
        run(config, llama, tmp_path / name)
        return (tmp_path / name / "model.safetensors").read_bytes()

    assert weights("a", 3) == weights("again", 3)
    assert weights("a-3", 3) != weights("other", 4)


def test_reference_layers_do_not_share_their_random_numbers(llama, tmp_path) -> None:
    run(portable(ratio=1, init="reference"), llama, tmp_path / "t.st")
    made = tensors(tmp_path / "t.st")
    taps = [made[f"model.layers.{layer}.mamba.conv1d.weight"] for layer in range(4)]
    assert not any(torch.equal(taps[0], other) for other in taps[1:])


def mean_kl(teacher: str, student: str, text: str) -> float:
    """KL(teacher, student) in nats per token of a text file."""
    tokenizer = load_tokenizer(teacher)
    models = [load_model(path, dtype=torch.float32) for path in (teacher, student)]
    total, tokens = 0.0, 0
    with torch.no_grad():
        for line in Path(text).read_text().splitlines():
            ids = tokenizer(json.loads(line)["text"], return_tensors="pt")["input_ids"]
            wanted, got = (model(ids).logits.log_softmax(-1) for model in models)
            total += float((wanted.exp() * (wanted - got)).sum())
            tokens += ids.shape[1]
    return total / tokens


@pytest.mark.parametrize("mixer", MIXERS)
def test_calibration_brings_the_student_closer(llama, text, mixer, tmp_path) -> None:
    """Than either start without data, on text the fit did not see."""
    unseen = write_sentences(tmp_path / "unseen.jsonl", 1, 12)
    configs = {
        "fit": calibrated(text, mixer=mixer),
        "prior": portable(mixer=mixer),
        "reference": portable(mixer=mixer, init="reference"),
    }
    found = {}
    for name, config in configs.items():
        result = run(config, llama, tmp_path / name)
        found[name] = mean_kl(llama, result.path, unseen)
    assert 0.001 < found["fit"] < 0.8 * min(found["prior"], found["reference"]), found


def test_calibration_is_reported_and_changes_mixers_alone(llama, text, tmp_path, capsys) -> None:
    result = run(calibrated(text), llama, tmp_path / "t.st")
    assert 0 < result.metrics["calibration_error"] < 1
    assert "half-life" in capsys.readouterr().err
    source, made = tensors(llama), tensors(tmp_path / "t.st")
    for name in source.keys() & made.keys():
        assert torch.equal(source[name], made[name]), name
    for layer in (0, 2):
        assert not torch.equal(
            made[f"model.layers.{layer}.mamba.out_proj.weight"],
            source[f"model.layers.{layer}.self_attn.o_proj.weight"],
        )


@pytest.mark.parametrize("ratio", [0.5, 1])
def test_streams_are_those_of_the_models(save_llama, text, ratio, tmp_path, monkeypatch) -> None:
    """Packed rows: the teacher's stream is the source's, the student's that of what is written."""
    source = save_llama()
    made = []

    class Kept(convert.Streams):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(convert, "Streams", Kept)
    run(calibrated(text, ratio=ratio), source, tmp_path / "t.st")
    streams = made[0]
    assert any(batch.seq_idx is not None for batch in streams.batches)
    # the walk ends with the last replaced layer
    after = 4 if ratio == 1 else 3
    for path, stream in ((source, streams.teacher), (str(tmp_path / "t.st"), streams.student)):
        model = load_model(path)
        # the norm would hide the last layer's own output
        model.model.norm = torch.nn.Identity()
        for batch, hidden in zip(streams.batches, stream, strict=True):
            with torch.no_grad():
                every = model.model(
                    batch.input_ids, position_ids=batch.position_ids, seq_idx=batch.seq_idx,
                    use_cache=False, output_hidden_states=True,
                ).hidden_states  # fmt: skip
            torch.testing.assert_close(
                hidden[batch.valid], every[after][batch.valid], rtol=1e-4, atol=1e-4
            )


def test_calibration_reads_as_many_tokens_as_asked(llama, text, monkeypatch, tmp_path) -> None:
    seen = []
    streams = convert.Streams

    def counting(model, embedding, batches):
        seen.extend(int(batch.valid.sum()) for batch in batches)
        return streams(model, embedding, batches)

    monkeypatch.setattr(convert, "Streams", counting)
    run(calibrated(text, calibrate_tokens=640), llama, tmp_path / "t.st")
    assert 0.9 * 640 < sum(seen) <= 640


def test_the_plan_writes_nothing(llama, text, tmp_path) -> None:
    found = json.loads(json.dumps(plan(calibrated(text), llama)))
    assert found["layers"] == ["mamba2", "attention"] * 2
    assert (found["replaced"], found["init"], found["documents"]) == ([0, 2], "calibrated", 80)
    run(portable(), llama, tmp_path / "t.st")
    model = load_model(str(tmp_path / "t.st"))
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["bytes"] == 2 * found["parameters"]
    with pytest.raises(UsageError, match="does not exist"):
        plan(portable(calibrate=["missing.jsonl"]), llama)


@pytest.mark.parametrize("ratio", [1.5, -1, float("nan")])
def test_a_ratio_outside_zero_to_one(llama, ratio, tmp_path) -> None:
    with pytest.raises(ValidationError, match="ratio"):
        portable(ratio=ratio)
    unchecked = portable().model_copy(update={"ratio": ratio})
    with pytest.raises(UsageError, match="is not between 0 and 1"):
        run(unchecked, llama, tmp_path / "t.st")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep_attention": [1, 4]}, "no layer 4 in a model of 4 layers"),
        ({"keep_attention": [-1]}, "no layer -1"),
        ({"init": "reference", "calibrate": ["words"]}, "--calibrate needs --init calibrated"),
        ({"calibrate": ["empty"]}, "empty.jsonl is empty"),
        ({"calibrate": ["columns"]}, "columns.jsonl, row 2: has the columns `prompt`"),
        ({"calibrate": ["short"]}, "no token to learn from"),
        ({"calibrate": ["missing.jsonl"]}, "missing.jsonl does not exist"),
    ],
)
@pytest.mark.parametrize("out", ["t", "t.st"])
def test_what_is_refused_leaves_nothing(llama, fields, message, out, tmp_path) -> None:
    contents = {
        "words": [{"text": "the old king"}],
        "empty": [],
        "columns": [{"text": "the old king"}, {"prompt": "the"}],
        "short": [{"text": "the"}],
    }
    data = tmp_path / "data"
    data.mkdir()
    for name, rows in contents.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (data / f"{name}.jsonl").write_text(lines)
    if "calibrate" in fields:
        files = [str(data / f"{n}.jsonl") if n in contents else n for n in fields["calibrate"]]
        fields = {**fields, "calibrate": files}
    with pytest.raises(UsageError, match=message):
        run(portable(**fields), llama, tmp_path / out)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_copy_is_said(llama, tmp_path, capsys) -> None:
    once, twice = tmp_path / "once", tmp_path / "twice"
    run(portable(ratio=0.5), llama, once)
    assert "warning" not in capsys.readouterr().err
    run(portable(ratio=0.5), str(once), twice)
    said = f"warning: {once} has no attention left to replace at this ratio: {twice} copies it"
    assert said in capsys.readouterr().err


def test_a_model_without_attention_is_refused(llama, tmp_path) -> None:
    run(portable(ratio=1), llama, tmp_path / "all.st")
    with pytest.raises(ModelError, match="no attention layer"):
        run(portable(), str(tmp_path / "all.st"), tmp_path / "t.st")
    assert not (tmp_path / "t.st").exists()


def test_mamba1_needs_heads_of_sixteen_channels(save_llama, tmp_path) -> None:
    source = save_llama(head_dim=12)
    with pytest.raises(ModelError, match="divisible by 16, this model has 12") as raised:
        run(portable(mixer="mamba1"), source, tmp_path / "t.st")
    assert "mamba2" in raised.value.hint
    assert list(tmp_path.iterdir()) == []
    run(portable(mixer="mamba2"), source, tmp_path / "t.st")
    assert bool(load_model(str(tmp_path / "t.st"))(torch.arange(9)[None]).logits.isfinite().all())


def with_changed(llama: str, folder: Path, change: Callable[[dict], None]) -> str:
    """A copy of a model with other weights."""
    shutil.copytree(llama, folder)
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
def test_a_number_that_is_not_finite_is_named(llama, name, tmp_path) -> None:
    """In a layer that stays and outside of them: nothing but streaming reads these."""
    bad = with_changed(llama, tmp_path / "bad", lambda s: s[name].view(-1)[3:4].fill_(torch.nan))
    with pytest.raises(ModelError, match=f"{name} holds NaN or infinite numbers"):
        run(portable(ratio=0.5), bad, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_too_large_for_the_type_on_disk_are_named(llama, tmp_path) -> None:
    large = with_changed(llama, tmp_path / "large", lambda s: s["model.norm.weight"].fill_(1e6))
    with pytest.raises(ModelError, match=r"model.norm.weight holds numbers too large for float16"):
        run(portable(ratio=0.5, dtype="float16"), large, tmp_path / "out")
    run(portable(ratio=0.5), large, tmp_path / "out")


@pytest.mark.parametrize("size", [1e15, 1e30])
def test_a_fit_that_overflows_is_a_failed_check(llama, text, size, tmp_path) -> None:
    """Each weight is finite, and what the layer computes with them is not."""

    def change(state: dict) -> None:
        for part in "vo":
            state[f"model.layers.1.self_attn.{part}_proj.weight"].mul_(size)

    large = with_changed(llama, tmp_path / "large", change)
    with pytest.raises(CheckError, match=r"layer.*1.* became NaN or infinite in the fit"):
        run(calibrated(text, keep_attention=[0, 2, 3]), large, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", ["t", "t.st"])
def test_output_that_exists_is_kept(llama, out, tmp_path, monkeypatch) -> None:
    run(portable(), llama, tmp_path / out)
    before = tensors(tmp_path / out)
    with monkeypatch.context() as patched:
        patched.setattr(Mamba2Spec, "initialise", lambda *_: pytest.fail("worked before it looked"))
        with pytest.raises(OutputError, match="exists") as raised:
            run(portable(ratio=1), llama, tmp_path / out)
    assert "--force" in raised.value.hint
    after = tensors(tmp_path / out)
    assert all(torch.equal(before[name], after[name]) for name in before)
    run(portable(ratio=1), llama, tmp_path / out, force=True)
    assert load_model(str(tmp_path / out)).config.mixers == ["mamba2"] * 4


@pytest.mark.parametrize("out", ["t", "t.st"])
@pytest.mark.parametrize("force", [False, True])
def test_an_interrupt_leaves_what_was_there(llama, out, force, tmp_path, monkeypatch) -> None:
    if force:
        run(portable(ratio=0.25), llama, tmp_path / out)
    initialise, layers = Mamba2Spec.initialise, []

    def interrupted(*arguments):
        layers.append(arguments)
        if len(layers) == 2:
            assert (tmp_path / f"{out}.partial").exists()
            raise KeyboardInterrupt
        initialise(*arguments)

    monkeypatch.setattr(Mamba2Spec, "initialise", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(portable(ratio=1), llama, tmp_path / out, force=force)
    assert [path.name for path in tmp_path.iterdir()] == ([out] if force else [])
    if force:
        assert load_model(str(tmp_path / out)).config.mixers.count("attention") == 3
