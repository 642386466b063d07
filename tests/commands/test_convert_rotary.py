"""`convert --rotary`: fits, chains, and refuses to mix two forms in one model."""

from dataclasses import replace

import pytest
import torch
from conftest import write_sentences

from mambactl.checkpoint.contents import describe
from mambactl.checkpoint.load import load_model
from mambactl.commands.convert import plan, run
from mambactl.data.pack import Batch
from mambactl.errors import UsageError
from mambactl.options import ConvertConfig
from mambactl.train.optimization import AlignmentObjective


@pytest.fixture(scope="module")
def llama(tiny_llama_dir) -> str:
    return str(tiny_llama_dir)


def batch() -> Batch:
    ids = torch.randint(3, 97, (4, 40), generator=torch.Generator().manual_seed(1))
    everything = torch.ones_like(ids, dtype=torch.bool)
    return Batch(ids, None, torch.arange(40).expand_as(ids), everything, everything)


def test_the_fit_knows_that_states_turn(llama, tmp_path) -> None:
    """Fitted weights are nearer to the attention than the same ones in a state that stays."""
    text = write_sentences(tmp_path / "text.jsonl", 0, 80)
    fit = ConvertConfig(rotary=True, keep_attention=[0, 1, 3], calibrate=[text], max_length=40)
    result = run(fit, llama, tmp_path / "t.st")
    assert result.metrics["rotary"] and result.metrics["calibration_error"] < 1
    teacher = load_model(llama, dtype=torch.float32).requires_grad_(False)
    student = load_model(result.path, dtype=torch.float32)
    turned = float(AlignmentObjective(student, teacher).backward(batch(), 1))
    mixer = student.model.layers[2].mixer
    mixer.sizes = replace(mixer.sizes, rotary=False)
    still = float(AlignmentObjective(student, teacher).backward(batch(), 1))
    assert 0 < turned < 0.99 * still, (turned, still)


def test_it_chains_and_is_told(llama, tmp_path) -> None:
    aligned = str(tmp_path / "all.st")
    run(ConvertConfig(by="layer", rotary=True, ratio=1), llama, tmp_path / "all.st")
    assert describe(aligned)["rotary"] and not describe(llama)["rotary"]
    # ready-made mixers bring their form
    run(ConvertConfig(mixers_from=aligned), llama, tmp_path / "half.st")
    half = load_model(str(tmp_path / "half.st"), dtype=torch.float32)
    assert half.config.rotates and half.config.mixers.count("attention") == 2
    more = run(ConvertConfig(rotary=True, ratio=1), str(tmp_path / "half.st"), tmp_path / "more.st")
    assert more.metrics["replaced_layers"] == [1, 3]
    for by in ("layer", "head"):
        assert plan(ConvertConfig(by=by, rotary=True), llama)["rotary"]


def test_one_model_has_one_form(llama, tmp_path) -> None:
    run(ConvertConfig(keep_attention=[1, 2, 3]), llama, tmp_path / "plain.st")
    run(ConvertConfig(keep_attention=[1, 2, 3], rotary=True), llama, tmp_path / "turned.st")
    run(ConvertConfig(form="portable", ratio=1), llama, tmp_path / "aligned.st")
    for source, fields, message, hint in (
        ("plain.st", {"rotary": True}, "of this model are not rotary", "drop --rotary"),
        ("turned.st", {}, "of this model are rotary", "add --rotary"),
        (llama, {"rotary": True, "mixer": "mamba1"}, "does not go with --mixer mamba1", "mamba2"),
        (llama, {"rotary": True, "mixers_from": "aligned.st"}, "are not rotary", "drop --rotary"),
    ):
        if "mixers_from" in fields:
            fields = {**fields, "mixers_from": str(tmp_path / fields["mixers_from"])}
        with pytest.raises(UsageError, match=message) as raised:
            run(ConvertConfig(**fields), str(tmp_path / source), tmp_path / "no.st")
        assert hint in raised.value.hint
    assert not (tmp_path / "no.st").exists()
