"""A model over a GPU and a second device computes what it computes on the GPU alone."""

from collections.abc import Callable

import pytest
import torch

from mambactl.checkpoint.load import load_model
from mambactl.checkpoint.save import save_model
from mambactl.decode.backend import make_engine
from mambactl.decode.engine import Engine
from mambactl.decode.sampler import SamplingParams
from mambactl.evaluation.layers import layer_errors
from mambactl.kernels import dispatch
from mambactl.models.device_map import Rooms, devices_of
from mambactl.models.hybrid import HybridForCausalLM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
FORMS = {
    "mamba2": ["mamba2", "attention"] * 2,
    "mamba1": ["attention", "mamba1"] * 2,
    "kept heads": ["mamba2_mixed", "mamba2_window", "mamba2_mixed", "attention"],
}
PROMPTS = [[5, 9, 33, 7] * 50, [4] * 40, [61]]


@pytest.fixture(params=["cpu", pytest.param("cuda:1", marks=two_gpus)])
def load(request, tmp_path) -> Callable[..., list[HybridForCausalLM]]:
    """load(model, dtype): the model on one GPU, and with half of its blocks on another device."""
    rooms = Rooms({torch.device(name): 10**9 for name in ("cuda:0", request.param)}, balanced=True)

    def of(model: HybridForCausalLM, dtype: torch.dtype) -> list[HybridForCausalLM]:
        out = str(save_model(model, tmp_path / f"{len(list(tmp_path.iterdir()))}.st", {}, None))
        whole = load_model(out, "cuda", dtype)
        split = load_model(out, dtype=dtype, rooms=rooms)
        assert len(devices_of(split)) == 2
        return [whole, split]

    return of


@pytest.mark.parametrize("form", FORMS)
def test_logits_are_those_of_one_gpu(load, make_hybrid, form) -> None:
    whole, split = load(make_hybrid(FORMS[form]), torch.float32)
    ids = torch.randint(3, 97, (2, 300), generator=torch.Generator().manual_seed(0)).cuda()
    with torch.no_grad():
        wanted, found = whole(ids).logits, split(ids).logits
    assert found.device == wanted.device
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("draft", [None, "ngram"])
def test_generated_tokens_are_those_of_one_gpu(load, make_hybrid, form, draft) -> None:
    """The reference engine on both: sums of the GPU's kernels are rounded in another order."""
    whole, split = load(make_hybrid(FORMS[form], seed=3), torch.float32)
    engine = make_engine(split, draft, 3 if draft else 0)
    assert isinstance(engine, Engine)
    params = SamplingParams(max_new_tokens=16)
    wanted = Engine(whole).generate(PROMPTS, params).tokens
    assert engine.generate(PROMPTS, params).tokens == wanted


def test_errors_of_layers_are_those_of_one_gpu(load, make_hybrid) -> None:
    students = load(make_hybrid(FORMS["mamba2"], seed=2), torch.float32)
    teachers = load(make_hybrid(["attention"] * 4, seed=1), torch.float32)
    documents = [list(range(3, 60)), list(range(20, 90))]
    wanted, found = (
        layer_errors(*each, documents) for each in zip(students, teachers, strict=True)
    )
    assert found == pytest.approx(wanted, rel=1e-3)
    # layers of one model beside layers of another elsewhere
    assert layer_errors(students[0], teachers[1], documents) == pytest.approx(wanted, rel=1e-3)


@two_gpus
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_run_on_the_gpu_of_their_inputs(dtype) -> None:
    """GPU 0 is the current one all the time."""
    draw = torch.Generator().manual_seed(0)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw).to(dtype)

    x, b, c = made(2, 200, 4, 16), made(2, 200, 2, 16), made(2, 200, 2, 16)
    dt, a = made(2, 200, 4).float().abs() * 0.1, -torch.ones(4)
    signal, taps = made(2, 200, 64), made(64, 4)
    results = []
    for device in ("cuda:0", "cuda:1"):
        assert torch.cuda.current_device() == 0
        y, state = dispatch.ssd(*(t.to(device) for t in (x, dt, a, b, c)))
        convolved = dispatch.causal_conv1d_silu(signal.to(device), taps.to(device), None)
        normed = dispatch.rms_norm(signal.to(device), torch.ones(64, device=device).to(dtype), 1e-5)
        found = (y, state, convolved, normed)
        assert {str(t.device) for t in found} == {device}
        results.append([t.cpu() for t in found])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)
