"""Synthetic models: published shapes, sound values, and tokens known in advance."""

from collections import Counter

import pytest
import torch

from mambactl.decode.drafters import ModelDrafter
from mambactl.decode.engine import Engine
from mambactl.decode.sampler import SamplingParams
from mambactl.models.hybrid import HybridForCausalLM, HybridModel
from mambactl.speed.shapes import (
    SHAPES,
    build,
    cycle_of,
    disagreeing,
    first_wrong,
    follows,
    materialise,
    script,
    spread_apart,
    successors,
)

TINY = ["tiny", "tiny-mamba", "tiny-mamba2", "tiny-hybrid", "tiny-draft"]
V, K = 512, 3
PRECISIONS = [torch.float32, torch.bfloat16]
SHARE = 0.3


def parameters(name: str) -> tuple[int, int]:
    """Blocks and norm; one embedding table."""
    with torch.device("meta"):
        model = HybridModel(SHAPES[name]())
    table = model.embed_tokens.weight.numel()
    return sum(p.numel() for p in model.parameters()) - table, table


@pytest.mark.parametrize(
    ("name", "published"),
    [  # with a tied head, as the files have it
        ("mamba-130m", 129_135_360),
        ("mamba-370m", 371_516_416),
        ("mamba-790m", 793_204_224),
        ("mamba-1.4b", 1_372_178_432),
        ("mamba-2.8b", 2_768_345_600),
        ("mamba2-130m", 128_989_632),
        ("mamba2-1.3b", 1_343_757_312),
        ("mamba2-2.7b", 2_702_599_680),
    ],
)
def test_native_shapes_have_the_published_parameters(name: str, published: int) -> None:
    blocks, table = parameters(name)
    assert blocks + table == pytest.approx(published, rel=1e-3)


def test_llama_shapes_have_the_published_parameters() -> None:
    blocks, table = parameters("llama3-8b")
    assert blocks + 2 * table == 8_030_261_248
    blocks, table = parameters("llama3-8b-hybrid-50")
    assert blocks + table == pytest.approx(7.776e9, rel=1e-3)


def test_hybrids_keep_the_layers_that_convert_keeps() -> None:
    for suffix, mixer in (("", "mamba2"), ("-mamba1", "mamba1")):
        for ratio, period in (("50", 2), ("87.5", 8)):
            config = SHAPES[f"llama3-8b-hybrid-{ratio}{suffix}"]()
            assert set(config.mixers) == {"attention", mixer}
            kept = [i for i, name in enumerate(config.mixers) if name == "attention"]
            assert kept == list(range(period - 1, 32, period))


def test_drafts_read_at_most_a_gigabyte() -> None:
    for suffix in ("2l", "3l", "2l-32k"):
        assert 0.9e9 < 2 * sum(parameters(f"draft-llama3-{suffix}")) <= 1e9
    assert not any(shape().tie_word_embeddings for shape in SHAPES.values())


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("name", TINY)
def test_a_model_built_on_its_device_is_an_ordinary_one(name: str, dtype: torch.dtype) -> None:
    model = build(name, "cpu", dtype, seed=3)
    # constructed as transformers does, with buffers that were never empty
    usual = HybridForCausalLM(SHAPES[name]()).to(dtype).eval()
    usual.load_state_dict(model.state_dict(), strict=True)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    for parameter_name, parameter in model.named_parameters():
        kept = parameter_name.rpartition(".")[2] in ("A_log", "D", "dt_bias")
        assert parameter.dtype == (torch.float32 if kept else dtype), parameter_name
        assert bool(parameter.isfinite().all()), parameter_name
    buffers = dict(usual.named_buffers())
    assert buffers.keys() == dict(model.named_buffers()).keys()
    for buffer_name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[buffer_name]), buffer_name
    tokens = torch.arange(40)[None] * 7 % V  # [1, T]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, usual(tokens).logits)


def test_weights_follow_from_the_seed() -> None:
    first, same, other = (build("tiny-hybrid", "cpu", torch.float32, seed) for seed in (1, 1, 2))
    name = "model.layers.0.mamba.in_proj.weight"
    weights = [model.state_dict()[name] for model in (first, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert weights[0].std() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("name", ["tiny-mamba", "tiny-mamba2"])
def test_decays_and_steps_are_those_of_mamba(name: str) -> None:
    layer = build(name, "cpu", torch.float32).model.layers[0].mamba
    decay = layer.A_log.exp()
    assert decay.min() >= 0.999 and decay.max() <= 16.001
    bias = layer.dt_proj.bias if name == "tiny-mamba" else layer.dt_bias
    step = torch.nn.functional.softplus(bias)
    assert step.min() >= 0.99e-3 and step.max() <= 0.101
    assert step.unique().numel() == step.numel()
    assert bool((layer.D == 1).all())


def cycle(successor: torch.Tensor, start: int) -> list[int]:
    seen = [start]
    while (token := int(successor[seen[-1]])) != start:
        seen.append(token)
        assert len(seen) <= len(successor)
    return seen


@pytest.mark.parametrize("limit", [None, 200])
def test_successors_are_one_cycle(limit: int | None) -> None:
    successor = successors(V, seed=1, limit=limit)
    inside = limit or V
    assert successor.shape == (V,) and successor.dtype == torch.int64
    assert sorted(cycle(successor, 0)) == list(range(inside))
    assert int(successor.max()) < inside
    assert not torch.equal(successor, successors(V, seed=2, limit=limit))
    assert torch.equal(successor, successors(V, seed=1, limit=limit))


@pytest.mark.parametrize("limit", [None, 200])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.0051, 0.3, 0.5, 1.0])
def test_disagreeing_differs_on_the_share(share: float, limit: int | None) -> None:
    successor = successors(V, seed=1, limit=limit)
    other = disagreeing(successor, share, seed=2)
    inside = limit or V
    differs = other != successor  # [V]
    assert int(differs.sum()) == int(differs[:inside].sum()) == round(share * inside)
    assert int(other.min()) >= 0 and int(other.max()) < inside
    if round(share * inside) != 1:
        assert other[:inside].unique().numel() == inside


def test_what_follows_is_checked() -> None:
    successor = torch.tensor([2, 0, 1])
    assert follows([2], successor) and follows([1, 0, 2, 1, 0], successor)
    assert not follows([1, 0, 1, 2], successor) and first_wrong([1, 0, 1, 2], successor) == 2


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("name", TINY)
def test_greedy_decoding_follows_the_script(name: str, dtype: torch.dtype) -> None:
    successor = successors(V, seed=5)
    model = build(name, "cpu", dtype, successor=successor)
    tokens = torch.randperm(V)[None]  # [1, V]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits.argmax(-1)[0], successor[tokens[0]])
    prompts = [[3, 4, 5], [6]]
    output = Engine(model).generate(prompts, SamplingParams(max_new_tokens=40))
    for prompt, new in zip(prompts, output.tokens, strict=True):
        assert len(new) == 40 and follows([prompt[-1], *new], successor)


def test_loud_blocks_do_not_matter() -> None:
    successor = successors(V)
    model = build("tiny-hybrid", "cpu", torch.float32)
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.mul_(20)
    script(model, successor)
    assert bool((model(torch.arange(V)[None]).logits.argmax(-1)[0] == successor).all())


def walk(successor: torch.Tensor, draft: torch.Tensor, start: int, count: int) -> Counter[int]:
    """Drafts kept by each step of speculative decoding, from the maps alone."""
    accepted, token = Counter(), start
    while count > 0:
        limit, kept = min(K, count - 1), 0
        while kept < limit and draft[token] == successor[token]:
            token, kept = int(successor[token]), kept + 1
        token = int(successor[token])
        accepted[kept] += 1
        count -= kept + 1
    return accepted


@pytest.mark.one_in(3)
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("target", ["tiny-mamba", "tiny-hybrid"])
def test_drafts_are_accepted_as_often_as_scripted(target: str, dtype: torch.dtype) -> None:
    successor = successors(V, seed=1)
    wrong = disagreeing(successor, SHARE, seed=2)
    engine = Engine(
        build(target, "cpu", dtype, successor=successor),
        ModelDrafter(build("tiny-draft", "cpu", dtype, seed=9, successor=wrong)),
        K,
    )
    output = engine.generate([[11, 12]], SamplingParams(max_new_tokens=400))
    assert follows([12, *output.tokens[0]], successor)
    histogram = output.stats.histogram
    # the first token comes with the prompt
    assert histogram == walk(successor, wrong, int(successor[12]), 399)
    rejected = sum(count for kept, count in histogram.items() if kept < K)
    tested = output.stats.accepted + rejected
    # the prompt ends inside of a period
    assert output.stats.accepted / tested == pytest.approx(1 - SHARE, abs=0.03)


@pytest.mark.parametrize("share", [0.1, 0.2, 0.3, 0.5])
@pytest.mark.parametrize("period", [256, 512])
def test_every_period_accepts_as_often_as_asked(share: float, period: int) -> None:
    """With any number of drafts, where independent draws are off by 0.06 now and then."""
    successor = successors(8192, seed=3)
    wrong = disagreeing(successor, share, seed=4, period=period)
    cycle, good, follow = cycle_of(successor).tolist(), (wrong == successor).tolist(), successor
    following = follow.tolist()
    for drafts in (1, 3, 4, 6):
        for start in cycle[:: 5 * period]:
            token, written, judged, kept = start, 0, 0, 0
            while written < period:
                n = 0
                while n < drafts and good[token]:
                    token, n = following[token], n + 1
                judged, kept = judged + min(n + 1, drafts), kept + n
                token, written = following[token], written + n + 1
            assert kept / judged == pytest.approx(1 - share, abs=0.015)


def test_drafts_disagree_as_often_in_every_period() -> None:
    chosen = spread_apart(1000, 0.3, torch.Generator().manual_seed(0), period=100)
    assert torch.bincount(chosen // 100).tolist() == [30] * 10
    assert chosen.unique().numel() == 300 and int(chosen.max()) < 1000
    # not one after the other: gaps are those of a draw by chance
    gaps = chosen.diff() - 1
    assert 0.25 < float((gaps == 0).float().mean()) < 0.35 and int(gaps.max()) > 6


def test_a_draft_of_a_trimmed_vocabulary() -> None:
    successor = successors(V, seed=1, limit=200)
    wrong = disagreeing(successor, SHARE, seed=2)
    config = SHAPES["tiny-draft"]()
    config.vocab_size = 200
    draft = materialise(config, "cpu", torch.float32, seed=4)
    script(draft, wrong)
    target = build("tiny-hybrid", "cpu", torch.float32, successor=successor)
    # 450 is a token that the draft lacks
    engine, params = Engine(target, ModelDrafter(draft, V), K), SamplingParams(max_new_tokens=90)
    known, unknown = (engine.generate([prompt], params) for prompt in ([450, 12], [3, 450]))
    assert known.stats.histogram == walk(successor, wrong, int(successor[12]), 89)
    assert follows([12, *known.tokens[0]], successor)
    assert follows([450, *unknown.tokens[0]], successor)


def test_impossible_maps_are_refused() -> None:
    for limit in (1, V + 1):
        with pytest.raises(ValueError, match="cycle"):
            successors(V, limit=limit)
    with pytest.raises(ValueError, match="share"):
        disagreeing(successors(V), 1.1)
    model = build("tiny", "cpu", torch.float32)
    for successor in (successors(2 * V), successors(V - 1)):
        with pytest.raises(ValueError, match="does not stay"):
            script(model, successor)
    tied = SHAPES["tiny"]()
    tied.tie_word_embeddings = True
    with pytest.raises(ValueError, match="tied"):
        script(HybridForCausalLM(tied), successors(V))


def test_many_tokens_may_share_a_successor() -> None:
    successor = successors(V, limit=5)
    model = build("tiny-mamba", "cpu", torch.bfloat16, successor=successor)
    with torch.no_grad():
        best = model(torch.arange(V)[None]).logits.argmax(-1)[0]
    assert torch.equal(best, successor)
