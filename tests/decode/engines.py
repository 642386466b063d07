"""The engine of whole steps with the reference kernels, the plain engine, and prompts for both."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F

from mambactl.decode.drafters import ModelDrafter, NgramDrafter
from mambactl.decode.engine import Engine
from mambactl.decode.gpu.fused_engine import FusedEngine
from mambactl.decode.sampler import SamplingParams
from mambactl.kernels.decode.reference import decode_attention, linear, recurrent
from mambactl.kernels.decode.reference.ops import ReferenceOps
from mambactl.models.key_ring import WindowSettings
from mambactl.models.mixers.mamba1 import Mamba1Settings
from mambactl.models.mixers.mamba2_decode import Mamba2Settings

NATIVE1 = Mamba1Settings(d_inner=40, dt_rank=3, d_state=6, native=True)
NATIVE2 = Mamba2Settings(4, 8, 12, x_heads=4, b_groups=1, c_groups=1, norm_groups=1)
ROTARY = Mamba2Settings(4, 8, 16, x_heads=2, b_groups=2, c_groups=4, norm_groups=4, rotary=True)
SPAN = WindowSettings(window=6, sinks=2)
GREEDY = SamplingParams(max_new_tokens=14)


def fused(target, draft=None, k=0, folder=None) -> FusedEngine:
    return FusedEngine(target, draft, k, ReferenceOps(), folder=folder)


def plain(target, draft=None, k=0, folder=None) -> Engine:
    if draft == "ngram":
        return Engine(target, NgramDrafter(), k, folder=folder)
    drafter = draft and ModelDrafter(draft, target.config.vocab_size)
    return Engine(target, drafter, k, folder=folder)


def noisy(model, noise: float):
    """The model itself, with noise added to its parameters: a draft that is right now and then."""
    g = torch.Generator().manual_seed(32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((noise * torch.randn(parameter.shape, generator=g)).to(parameter))
    return model


def prompts_of(lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Random prompts that repeat themselves, so that n-grams find something to copy."""
    g = torch.Generator().manual_seed(seed)
    cycle = [torch.randint(3, 97, (12,), generator=g).tolist() for _ in lengths]
    return [(tokens * (n // 12 + 1))[:n] for tokens, n in zip(cycle, lengths, strict=True)]


def rows_one_by_one(monkeypatch) -> None:
    """Let no number of the reference kernels depend on how many rows there are: sums of products,
    and functions of which vector units compute another last bit than scalar ones.
    """

    def by_row(function):
        def run(x):
            rows = x.reshape(-1, x.shape[-1])
            return torch.stack([function(row) for row in rows]).view(x.shape)

        return run

    def normed(scaled, squares, eps, w, bias):
        rate = torch.rsqrt(squares.sum(1, keepdim=True) / scaled.shape[1] + eps)
        y = torch.stack([row @ w.T for row in scaled]) * rate
        return y if bias is None else y + bias

    def add_residual(x, w, bias, hidden, gain, scaled, squares, beside=()):
        y = sum(torch.stack([row @ m.T for row in rows]) for rows, m in ((x, w), *beside))
        y = y if bias is None else y + bias
        linear.put_stream(hidden + y, gain, hidden, scaled, squares)

    def convolved(raw, weight, bias):
        taps = [raw[:, i : raw.shape[1] - 3 + i] * weight[:, i] for i in range(4)]
        return functions.silu(sum(taps) + bias)

    def attention(q, keys, values, start, count, scale, out, *scratch, T, offset=0, **keywords):
        rows = [x.unflatten(0, (-1, T)) for x in (q, out)]  # [B, T, H P]
        for t in range(T):
            one, into = (x[:, t].clone() for x in rows)
            whole(one, keys, values, start, count, 1, into, *scratch, T=1, offset=offset + t,
                  **keywords)  # fmt: skip
            rows[1][:, t] = into

    whole = decode_attention.decode_attention
    functions = SimpleNamespace(silu=by_row(F.silu), softplus=by_row(F.softplus))

    monkeypatch.setattr(linear, "normed", normed)
    monkeypatch.setattr(recurrent, "convolved", convolved)
    monkeypatch.setattr(recurrent, "F", functions)
    monkeypatch.setattr(ReferenceOps, "add_residual", staticmethod(add_residual))
    monkeypatch.setattr(ReferenceOps, "attention", staticmethod(attention))
    monkeypatch.setattr(recurrent, "decode_attention", attention)
