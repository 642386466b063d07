"""Every weight is used by calling its module, wherever something acts on that call."""

import copy
from collections.abc import Iterator

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from conftest import tiny_config
from torch import nn

from mambactl.models.cache import HybridCache
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.models.mixers.modules import CausalConv, is_its_weight

LENGTH = 20


def called(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that have parameters, with their names."""
    for name, module in model.named_modules():
        if list(module.parameters(recurse=False)):
            yield name, module


def logits_of(model: nn.Module, ids: torch.Tensor, cached: bool) -> torch.Tensor:
    """Logits [B, T, V] of whole rows, or of a prompt, several tokens and one."""
    with torch.no_grad():
        if not cached:
            return model(ids, use_cache=False).logits
        cache = HybridCache(model.config, len(ids), ids.device, recording=True)
        parts = ids.split([12, 7, 1], 1)
        return torch.cat([model(part, past_key_values=cache).logits for part in parts], 1)


@pytest.mark.parametrize("cached", [False, True], ids=["whole", "cached"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_hooks_of_every_module_fire(any_model, draw_ids, uncached, cached, training) -> None:
    any_model.train(training)
    expected = logits_of(any_model, draw_ids(2, LENGTH), cached)
    fired = set()
    for name, module in called(any_model):
        module.register_forward_hook(lambda *_, name=name: fired.add(name))
    found = logits_of(any_model, draw_ids(2, LENGTH), cached)
    assert fired == {name for name, _ in called(any_model)}
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_an_offloaded_model_computes_the_same(any_model, draw_ids, place, tmp_path) -> None:
    ids = draw_ids(2, LENGTH)
    for training in (False, True):
        any_model.train(training)
        expected = [logits_of(any_model, ids, cached) for cached in (False, True)]
        offloaded = copy.deepcopy(any_model)
        if place == "memory":
            cpu_offload(offloaded, execution_device="cpu")
        else:
            disk_offload(offloaded, tmp_path, execution_device="cpu")
        assert {p.device.type for p in offloaded.parameters()} == {"meta"}
        for cached, wanted in zip((False, True), expected, strict=True):
            found = logits_of(offloaded, ids, cached)
            torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))


def places_of(model, head: int, odd: int | str) -> dict[str, int | str]:
    """A device map: every second layer on `odd`, the head on `head`, all else on the first GPU."""
    parts = [name for name, _ in model.model.named_children() if name != "layers"]
    places: dict[str, int | str] = {f"model.{name}": 0 for name in parts} | {"lm_head": head}
    for index in range(model.config.num_hidden_layers):
        places[f"model.layers.{index}"] = odd if index % 2 else 0
    return places


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("cached", [False, True], ids=["whole", "cached"])
def test_layers_of_the_gpu_s_model_may_lie_in_memory(any_model, draw_ids, cached) -> None:
    ids = draw_ids(2, LENGTH).cuda()
    expected = logits_of(copy.deepcopy(any_model).cuda(), ids, cached)
    offloaded = dispatch_model(any_model, places_of(any_model, head=0, odd="cpu"))
    assert {p.device.type for p in offloaded.parameters()} == {"meta", "cuda"}
    found = logits_of(offloaded, ids, cached)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("cached", [False, True], ids=["whole", "cached"])
def test_layers_may_lie_on_two_devices(any_model, draw_ids, cached) -> None:
    ids = draw_ids(2, LENGTH).cuda()
    expected = logits_of(copy.deepcopy(any_model).cuda(), ids, cached)
    spread = dispatch_model(any_model, places_of(any_model, head=1, odd=1))
    assert {p.device.index for p in spread.parameters()} == {0, 1}
    found = logits_of(spread, ids, cached)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))


def test_a_context_moves_whole(windowed_model, draw_ids) -> None:
    cache = HybridCache(windowed_model.config, 2, recording=True)
    seq_idx = torch.zeros(2, LENGTH, dtype=torch.long)
    _, packed = windowed_model.model.enter(draw_ids(2, LENGTH), seq_idx=seq_idx)
    hidden = windowed_model.model.embed_tokens(draw_ids(2, LENGTH))
    for context in (packed, windowed_model.model.context(hidden, cache=cache)):
        moved = context.to("meta")
        assert type(moved) is type(context)
        assert {t.device.type for t in tensors_of(moved)} == {"meta"}
        assert len(list(tensors_of(moved))) == len(list(tensors_of(context)))


def tensors_of(value: object) -> Iterator[torch.Tensor]:
    """The tensors in a context, however deep."""
    if isinstance(value, torch.Tensor):
        yield value
        return
    parts = value if isinstance(value, tuple) else getattr(value, "__dict__", None)
    parts = value if isinstance(value, dict) else parts
    for part in parts.values() if isinstance(parts, dict) else parts or ():
        yield from tensors_of(part)


def test_only_a_plain_linear_map_is_its_weight() -> None:
    plain = nn.Linear(4, 4)
    assert is_its_weight(plain)
    hooked, wrapped = nn.Linear(4, 4), nn.Linear(4, 4)
    handle = hooked.register_forward_pre_hook(lambda *_: None)
    wrapped.forward = wrapped.forward
    assert not is_its_weight(hooked)
    assert not is_its_weight(wrapped)
    handle.remove()
    assert is_its_weight(hooked)


def test_weights_that_a_checkpoint_lacks_are_those_of_a_new_model(tmp_path) -> None:
    mixers = ["mamba2", "mamba1", "mamba2_window", "mamba2_mixed", "attention"]
    config = tiny_config(mixers)
    new = HybridForCausalLM(config)
    partial = {name: t for name, t in new.state_dict().items() if ".mamba." not in name}
    loaded = HybridForCausalLM.from_pretrained(None, config=config, state_dict=partial)
    for name, module in new.named_modules():
        other = loaded.get_submodule(name)
        for key in ("A_log", "D", "dt_bias"):
            if hasattr(module, key):
                assert torch.equal(getattr(module, key), getattr(other, key)), f"{name}.{key}"
        if isinstance(module, CausalConv):
            assert not other.bias.any()
            assert 0 < float(other.weight.std()) < 2 * config.initializer_range
