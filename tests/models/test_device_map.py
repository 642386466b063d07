"""A model whose blocks are on two devices computes what it computes on one."""

import json
from collections.abc import Callable
from copy import deepcopy
from inspect import unwrap

import numpy as np
import pytest
import torch
from decode.heads import guided, head_for
from fixtures.two_devices import KIND, Located
from safetensors.torch import save

from mambactl.checkpoint.load import load_model
from mambactl.checkpoint.save import save_model
from mambactl.conversion.choice import UNITS
from mambactl.conversion.gates import GateTraining
from mambactl.conversion.ranking import Instruments
from mambactl.conversion.removal import Removals
from mambactl.data.encoding import Example
from mambactl.data.pack import collate, pack
from mambactl.decode import backend
from mambactl.decode.backend import make_engine
from mambactl.decode.engine import Engine
from mambactl.decode.sampler import SamplingParams
from mambactl.errors import ModelError, ResourceError, UsageError
from mambactl.evaluation import fidelity, likelihood
from mambactl.evaluation.layers import layer_errors
from mambactl.evaluation.probes import EvalConfig
from mambactl.evaluation.recall import kv_probe, measure_recall
from mambactl.models.device_map import DeviceMap, Rooms, Sizes, devices_of
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.models.key_ring import WindowSettings
from mambactl.models.own_device import OwnDevice
from mambactl.options import ConvertConfig, GenerateConfig, TeacherCacheConfig
from mambactl.train.cached_teacher import Drawing, draw_batch

FORMS = {
    "attention": ["attention"] * 4,
    "mamba2": ["mamba2", "attention"] * 2,
    "mamba1": ["attention", "mamba1"] * 2,
    "window": ["mamba2_window", "attention"] * 2,
    "kept heads": ["mamba2_mixed", "mamba2_window", "mamba2_mixed", "attention"],
}
PROMPTS = [[5, 9, 33, 7, 5, 9, 33], [4] * 40, [61]]
Split = Callable[[HybridForCausalLM], HybridForCausalLM]


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 2e-4) -> None:
    """Assert like numbers: on no device that torch knows, it adds them in another order."""
    assert isinstance(found, Located)
    torch.testing.assert_close(found.inner, wanted, rtol=1e-3, atol=tolerance)


@pytest.fixture
def split(two_devices, tmp_path) -> Split:
    """split(model): the same model from a file, half of its blocks on each device."""

    def load(model: HybridForCausalLM) -> HybridForCausalLM:
        out = save_model(model, tmp_path / f"{len(list(tmp_path.iterdir()))}.st", {}, None)
        rooms = Rooms(dict.fromkeys(two_devices, 10**9), balanced=True)
        return load_model(str(out), dtype=torch.float32, rooms=rooms).requires_grad_(False)

    return load


@pytest.fixture
def pair(make_hybrid) -> tuple[HybridForCausalLM, HybridForCausalLM]:
    """A student and its teacher."""
    return make_hybrid(FORMS["window"], seed=2), make_hybrid(FORMS["attention"], seed=1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_those_of_one_device(two_devices, split, make_hybrid, form, tied) -> None:
    whole = make_hybrid(FORMS[form], tie_word_embeddings=tied)
    model = split(whole)
    assert devices_of(model) == list(two_devices)
    assert {p.device for p in model.model.layers[3].parameters()} == {two_devices[1]}
    assert model.hf_device_map["model.layers.3"] == two_devices[1]
    ids = torch.tensor([[1, 5, 7, 9, 3] * 20, [8, 2, 44, 17, 6] * 20])
    with torch.no_grad():
        wanted, got = whole(ids), model(ids.to(two_devices[0]))
    assert got.logits.device == two_devices[0]
    close(got.logits, wanted.logits)
    held = [tensor.device for layer in got.past_key_values.layers for tensor in layer.tensors()]
    assert set(held) == set(two_devices)


def test_packed_rows_are_those_of_one_device(two_devices, split, make_hybrid) -> None:
    whole = make_hybrid(FORMS["mamba2"], sliding_window=16)
    model, ids = split(whole), torch.arange(60)[None] + 3
    positions = torch.cat([torch.arange(25), torch.arange(35)])[None]
    with torch.no_grad():
        wanted = whole(ids, position_ids=positions).logits
        first = two_devices[0]
        got = model(ids.to(first), position_ids=positions.to(first)).logits
    close(got, wanted)


@pytest.mark.parametrize(
    ("form", "draft"),
    [
        *((form, None) for form in FORMS),
        *(("mamba2", "ngram"), ("kept heads", "model"), ("window", "head")),
    ],
)
def test_generated_tokens_are_those_of_one_device(split, make_hybrid, form, draft) -> None:
    whole = guided(make_hybrid(FORMS[form], seed=3))
    models, drafts = [whole, split(whole)], [draft, draft]
    if draft == "model":
        own = guided(make_hybrid(FORMS[form], seed=3))
        drafts = [own, split(own)]
    if draft == "head":
        drafts = [head_for(model) for model in models]
    params, k = SamplingParams(max_new_tokens=6), 3 if draft else 0
    wanted, found = (
        make_engine(model, other, k).generate(PROMPTS, params)
        for model, other in zip(models, drafts, strict=True)
    )
    assert found.tokens == wanted.tokens
    assert (found.stats.accepted > 0) == (draft in ("model", "head"))


def test_drawn_tokens_are_those_of_one_device(split, make_hybrid) -> None:
    whole = make_hybrid(FORMS["kept heads"], seed=3)
    params = SamplingParams(temperature=0.8, top_k=20, top_p=0.9, max_new_tokens=6, seed=4)
    wanted, found = (Engine(model).generate(PROMPTS, params) for model in (whole, split(whole)))
    assert found.tokens == wanted.tokens


def test_one_graph_does_not_hold_several_devices(split, make_hybrid, monkeypatch, capsys) -> None:
    """The reference engine decodes where GPU kernels run, and one line says why."""
    backend._say_once.cache_clear()
    model = split(make_hybrid(FORMS["mamba2"]))
    monkeypatch.setattr(backend, "why_not", lambda device: None)
    assert isinstance(make_engine(model, None, 0), Engine)
    assert backend._several_devices(None, model) == "they need one device, a model is on 2"
    assert backend._several_devices(make_hybrid(FORMS["mamba2"]), "ngram") is None


def test_measurements_are_those_of_one_device(split, pair, monkeypatch) -> None:
    student, teacher = pair
    other = split(student), split(teacher)
    draw = torch.Generator().manual_seed(0)
    documents = [torch.randint(97, (n,), generator=draw).tolist() for n in (40, 23, 9)]
    wanted = layer_errors(*pair, documents)
    # the tensors of these devices are none of inference mode
    monkeypatch.setattr(fidelity, "predict", torch.no_grad()(unwrap(fidelity.predict)))
    errors = torch.no_grad()(unwrap(layer_errors))
    # also layers of a student on one of the devices beside those of a teacher on both
    alone = deepcopy(student).to(next(iter(devices_of(other[1]))))
    for each in (other[0], alone):
        assert errors(each, other[1], documents) == pytest.approx(wanted, rel=1e-3)
    found, wanted = (fidelity.fidelity(*each, documents, max_length=32) for each in (other, pair))
    assert {name: found[name] for name in fidelity.MEANS} == pytest.approx(
        {name: wanted[name] for name in fidelity.MEANS}, rel=1e-3, abs=1e-6
    )
    for limits in (likelihood.TOKENS, likelihood.HEAD_POSITIONS):
        monkeypatch.setitem(limits, KIND, limits["cpu"])
    # some begin alike, and are read on from a common cache
    requests = [likelihood.Request(documents[0], [n, n + 1]) for n in range(5)] + [
        likelihood.Request([8, 4], [9])
    ]
    found, wanted = (likelihood.log_likelihoods(each[0], requests, 64, 2) for each in (other, pair))
    assert [value for value, _ in found] == pytest.approx([value for value, _ in wanted], rel=1e-3)


def test_recall_is_that_of_one_device(split, pair, tiny_tokenizer) -> None:
    probe = kv_probe(tiny_tokenizer, 90, 2, seed=0)
    found, wanted = (measure_recall(model, probe) for model in (split(pair[0]), pair[0]))
    assert found == pytest.approx(wanted, rel=1e-3)


def test_selection_is_that_of_one_device(split, pair, tiny_tokenizer) -> None:
    teacher = pair[1].requires_grad_(False)
    units, window = UNITS["head"].of(teacher.config), WindowSettings(6, 2)
    examples = [Example(np.array([5, 9, 33] * 20), np.ones(60, bool)) for _ in range(2)]
    batches = [collate(pack(examples, 60))]
    found, wanted, worth, wanted_worth = [], [], [], []
    for model, scores, opened in ((split(teacher), found, worth), (teacher, wanted, wanted_worth)):
        probe = kv_probe(tiny_tokenizer, 90, 2, seed=0)
        instruments = Instruments(model, batches, [probe])
        scores.append(Removals(instruments, units, window, "recall", exchanges=0).run(2))
        training = GateTraining(instruments, window, seed=0)
        training._divergence(instruments.rows[0]).backward()
        opened.append(training.gates.grad)
    assert found[0].ranking == wanted[0].ranking
    assert [s.kl for s in found[0].scores.values()] == pytest.approx(
        [s.kl for s in wanted[0].scores.values()], rel=1e-3
    )
    close(worth[0], wanted_worth[0], 1e-6)


def test_teachers_draw_what_they_draw_on_one_device(two_devices, split, pair) -> None:
    teacher = pair[1]
    batch = collate(pack([Example(np.arange(60) + 3, np.ones(60, bool))], 60))
    drawn = []
    for model, device in ((teacher, "cpu"), (split(teacher), two_devices[0])):
        drawn += draw_batch(model, batch.to(device), [b"0" * 32], Drawing(4), None)
    assert torch.equal(drawn[0].ids, drawn[1].ids)
    torch.testing.assert_close(drawn[0].masses, drawn[1].masses, rtol=1e-3, atol=1e-4)


def test_a_context_is_copied_once_for_all_blocks_of_a_device(two_devices, make_hybrid) -> None:
    first, second = two_devices
    model, own = make_hybrid(["attention"]).model, OwnDevice(second)
    hidden, context = model.enter(torch.tensor([[1, 2, 3]]))
    assert own.entered(hidden, context)[0].device == second
    moved = own.entered(hidden, context)[1]
    assert moved.positions.device == moved.angles[0].device == second
    assert own.entered(hidden, context)[1] is moved
    again = model.context(hidden)
    assert own.entered(hidden, again)[1] is not moved


GPUS = [torch.device("cuda", index) for index in range(3)]


def blocks_on(found: DeviceMap) -> list[int]:
    """The number of blocks of each device."""
    return [found.blocks.count(gpu) for gpu in found.devices]


def test_one_device_has_all_where_it_has_room() -> None:
    sizes = Sizes([10] * 8, 20)
    assert sizes.total == 100
    whole = DeviceMap.of(sizes, Rooms(dict.fromkeys(GPUS, 100)))
    assert whole.devices == GPUS[:1]
    assert whole.device_of("model.layers.7.mlp.up_proj.weight") == GPUS[0]
    even = DeviceMap.of(sizes, Rooms(dict.fromkeys(GPUS[:2], 100), balanced=True))
    assert blocks_on(even) == [3, 5]


def test_blocks_go_in_order_to_the_devices_that_have_room() -> None:
    sizes = Sizes([10] * 8, 20)
    found = DeviceMap.of(sizes, Rooms(dict.fromkeys(GPUS, 99)))
    assert blocks_on(found) == [2, 4, 2]
    assert [found.device_of(f"model.layers.{n}.x") for n in (1, 2, 6)] == GPUS
    assert found.device_of("lm_head.weight") == found.device_of("model.norm.weight") == GPUS[0]
    assert "0 to 1 on cuda:0, 2 to 5 on cuda:1, 6 to 7 on cuda:2" in found.describe()
    # even shares do not fit
    uneven = DeviceMap.of(sizes, Rooms(dict(zip(GPUS, (30, 60, 15), strict=True))))
    assert blocks_on(uneven) == [1, 6, 1]
    # what is around the blocks is more than a share
    assert blocks_on(DeviceMap.of(Sizes([10] * 4, 60), Rooms(dict.fromkeys(GPUS, 65)))) == [0, 2, 2]


@pytest.mark.parametrize("room", [(15, 100), (40, 40)])
def test_what_does_not_fit_is_a_sentence(room) -> None:
    with pytest.raises(ResourceError, match="100 B of weights, of which embedding and head") as no:
        DeviceMap.of(Sizes([10] * 8, 20), Rooms(dict(zip(GPUS[:2], room, strict=True))))
    assert f"{room[0]} B on cuda:0, {room[1]} B on cuda:1" in str(no.value)
    assert "--max-memory" in no.value.hint


def test_sizes_are_those_of_the_weights(make_hybrid) -> None:
    model = make_hybrid(FORMS["mamba2"], tie_word_embeddings=True)
    assert Sizes.of(model, torch.float32).total == sum(p.nbytes for p in model.parameters())
    # A_log, D and dt_bias stay wide
    assert Sizes.of(model, torch.bfloat16).total == sum(
        p.nbytes if name.endswith(("A_log", ".D", "dt_bias")) else p.nbytes // 2
        for name, p in model.named_parameters()
    )


def test_rooms_are_those_of_the_gpus(monkeypatch) -> None:
    config = TeacherCacheConfig(data=["x"], device_map="auto")
    assert Rooms.of(config) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (1000 - 500 * gpu.index, 2000))
    assert Rooms.of(config) == Rooms({GPUS[0]: 900, GPUS[1]: 450})
    asked = TeacherCacheConfig(data=["x"], device_map="balanced", max_memory=1.5)
    assert Rooms.of(asked) == Rooms(dict.fromkeys(GPUS[:2], 1_500_000_000), balanced=True)
    assert Rooms.of(TeacherCacheConfig(data=["x"])) is None
    assert Rooms.of(TeacherCacheConfig(data=["x"], device_map="auto", device="cpu")) is None


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"device_map": "auto", "nproc": 2}, "--nproc one to each"),
        ({"device_map": "auto", "device": "cuda:1"}, "--device cuda:1 one device"),
        ({"device_map": "auto", "device": "cpu"}, "--device cpu one device"),
        ({"max_memory": 3.0}, "--max-memory goes with --device-map"),
    ],
)
def test_what_contradicts_a_device_map_is_a_sentence(options, problem) -> None:
    for config in (
        GenerateConfig(dataset=["x"], **options),
        ConvertConfig(select="kl", **options),
        TeacherCacheConfig(data=["x"], **options),
        EvalConfig(data=["x"], **options),
    ):
        with pytest.raises(UsageError, match=problem):
            config.require_coherent()


def test_a_device_map_is_for_what_is_measured() -> None:
    with pytest.raises(UsageError, match="--select measures"):
        ConvertConfig(device_map="auto").require_coherent()
    # one prompt may need all GPUs as well
    GenerateConfig(prompt="x", device_map="auto").require_coherent()


def test_models_of_their_own_code_stay_on_one_device(tmp_path) -> None:
    config = {"model_type": "other", "auto_map": {"AutoModelForCausalLM": "other.Other"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(save({"x": torch.zeros(1)}))
    with pytest.raises(ModelError, match="stays on one device"):
        load_model(str(tmp_path), trust_remote_code=True, rooms=Rooms({GPUS[0]: 1}))
