"""Checkpoints in the layouts of MambaInLlama, M1 and Qwerky, and what they compute.

Weights are drawn and written here, and the equations are written out below, token by token in fp64:
nothing is shared with the reader. Norms and biases are far from neutral.
"""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import write_sentences
from decode.engines import GREEDY, plain, prompts_of
from safetensors.torch import save_file
from torch import Tensor

from mambactl.checkpoint.contents import describe
from mambactl.checkpoint.load import load_model
from mambactl.commands import distill, export
from mambactl.decode.gpu.fused_engine import FusedEngine
from mambactl.errors import ModelError
from mambactl.kernels.decode.reference.ops import ReferenceOps
from mambactl.options import DistillConfig, ExportConfig

D, H, HK, P, INNER, VOCABULARY, LAYERS = 48, 4, 2, 16, 56, 97, 4
ATTENTION = (1, 3)
THETA, EPS = 5e5, 1e-4
SCALING = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
RANK, STATES = 3, 16
SSM2 = {"ngroups": H, "d_state": P}
Weights = dict[str, Tensor]


def draw(mamba: int, biased: bool = False) -> Weights:
    """Every matrix by itself, under names of this file."""
    g = torch.Generator().manual_seed(mamba)
    found: Weights = {}

    def add(name: str, *shape: int, scale: float | None = None, shift: float = 0.0) -> None:
        scale = shape[-1] ** -0.5 if scale is None else scale
        found[name] = (shift + scale * torch.randn(*shape, generator=g)).float()

    add("embed", VOCABULARY, D, scale=1.0)
    add("head", VOCABULARY, D)
    add("norm", D, scale=0.2, shift=1.0)
    for i in range(LAYERS):
        for name in ("norm1", "norm2"):
            add(f"{i}.{name}", D, scale=0.2, shift=1.0)
        add(f"{i}.gate", INNER, D)
        add(f"{i}.up", INNER, D)
        add(f"{i}.down", D, INNER)
        # queries or C, keys or B, values or x, output
        for name, rows in (("q", H * P), ("k", HK * P), ("v", HK * P)):
            add(f"{i}.{name}", rows, D)
            if biased and i in ATTENTION:
                add(f"{i}.{name}.bias", rows, scale=0.3)
        add(f"{i}.o", D, H * P)
        if i in ATTENTION:
            continue
        channels = H * P + (2 * HK * P if mamba == 2 else 0)
        add(f"{i}.z", H * P, D)
        add(f"{i}.conv", channels, 1, 4, scale=0.5)
        add(f"{i}.conv.bias", channels, scale=0.3)
        wide = (H,) if mamba == 2 else (H * P,)
        add(f"{i}.D", *wide, scale=0.3, shift=1.0)
        add(f"{i}.A_log", *(wide if mamba == 2 else (H * P, STATES)), scale=0.5)
        add(f"{i}.dt.bias", *wide, scale=0.3, shift=-1.0)
        if mamba == 2:
            add(f"{i}.dt", H, D)
            add(f"{i}.gated", H * P, scale=0.2, shift=1.0)
        else:
            add(f"{i}.dt_down", RANK, D)
            add(f"{i}.dt", H * P, RANK)
    return found


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def frequencies(scaled: bool) -> Tensor:
    """Llama 3.1's, or plain ones."""
    plain_ones = THETA ** (-torch.arange(0, P, 2, dtype=torch.float64) / P)
    if not scaled:
        return plain_ones
    s, found = SCALING, []
    for f in plain_ones.tolist():
        length = 2 * math.pi / f
        ratio = s["original_max_position_embeddings"] / length
        share = (ratio - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
        share = min(max(share, 0.0), 1.0)
        found.append((1 - share) * f / s["factor"] + share * f)
    return torch.tensor(found, dtype=torch.float64)


def attention(w: Weights, i: int, u: Tensor, scaled: bool) -> Tensor:
    """u [T, D]; one query at a time."""
    q, k, v = (
        (u @ w[f"{i}.{n}"].T + w.get(f"{i}.{n}.bias", torch.zeros(1))).view(len(u), -1, P)
        for n in "qkv"
    )
    turns = torch.arange(len(u))[:, None, None] * frequencies(scaled)
    c, s = turns.cos(), turns.sin()

    def turned(x: Tensor) -> Tensor:
        a, b = x[..., : P // 2], x[..., P // 2 :]
        return torch.cat([a * c - b * s, b * c + a * s], -1)

    q, k = turned(q), turned(k)
    out = torch.zeros(len(u), H, P, dtype=u.dtype)
    for t in range(len(u)):
        for h in range(H):
            kv = h // (H // HK)
            weights = (k[: t + 1, kv] @ q[t, h] / math.sqrt(P)).softmax(0)
            out[t, h] = weights @ v[: t + 1, kv]
    return out.flatten(1) @ w[f"{i}.o"].T


def convolved(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Causal, of four taps, and SiLU; x [T, C]."""
    rows = torch.cat([torch.zeros(3, x.shape[1], dtype=x.dtype), x])
    taps = [rows[j : j + len(x)] * weight[:, 0, j] for j in range(4)]
    return F.silu(sum(taps) + bias)


def mamba1(w: Weights, i: int, u: Tensor) -> Tensor:
    z, x, B, C = (u @ w[f"{i}.{n}"].T for n in ("z", "v", "k", "q"))
    rep = H // HK
    # groups of 16 channels, each repeated for those that follow it
    x = x.view(len(u), -1, 16).repeat_interleave(rep, 1).flatten(1)
    B = B.view(len(u), -1, STATES)
    C = C.view(len(u), -1, STATES)
    x = convolved(x, w[f"{i}.conv"], w[f"{i}.conv.bias"])
    bias = w[f"{i}.dt.bias"]
    raw = (u @ w[f"{i}.dt_down"].T) @ w[f"{i}.dt"].T + bias
    # the projection has added the bias already
    dt = F.softplus(raw + bias)
    A, state, rows = -w[f"{i}.A_log"].exp(), torch.zeros(H * P, STATES, dtype=u.dtype), []
    group = torch.arange(H * P) // 16
    for t in range(len(u)):
        state = (dt[t][:, None] * A).exp() * state
        state = state + (dt[t] * x[t])[:, None] * B[t][group // rep]
        rows.append((state * C[t][group]).sum(1) + w[f"{i}.D"] * x[t])
    return (torch.stack(rows) * F.silu(z)) @ w[f"{i}.o"].T


def mamba2(w: Weights, i: int, u: Tensor) -> Tensor:
    z = u @ w[f"{i}.z"].T
    mixed = torch.cat([u @ w[f"{i}.{n}"].T for n in ("v", "k", "q")], 1)
    mixed = convolved(mixed, w[f"{i}.conv"], w[f"{i}.conv.bias"])
    x, B, C = (part.view(len(u), -1, P) for part in mixed.split([HK * P, HK * P, H * P], 1))
    dt = F.softplus(u @ w[f"{i}.dt"].T + w[f"{i}.dt.bias"])
    A, out = -w[f"{i}.A_log"].exp(), torch.zeros(len(u), H, P, dtype=u.dtype)
    for h in range(H):
        kv, state = h // (H // HK), torch.zeros(P, P, dtype=u.dtype)
        for t in range(len(u)):
            state = (dt[t, h] * A[h]).exp() * state + dt[t, h] * torch.outer(x[t, kv], B[t, kv])
            out[t, h] = state @ C[t, h] + w[f"{i}.D"][h] * x[t, kv]
    gated = out * F.silu(z).view(out.shape)
    gated = gated / (gated.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return (gated.flatten(1) * w[f"{i}.gated"]) @ w[f"{i}.o"].T


def logits(w: Weights, mamba: int, ids: Tensor, scaled: bool) -> Tensor:
    """Compute the logits [T, V] of one row of tokens [T], token by token."""
    w = {name: tensor.double() for name, tensor in w.items()}
    hidden = w["embed"][ids]
    for i in range(LAYERS):
        u = rms(hidden, w[f"{i}.norm1"], EPS)
        if i in ATTENTION:
            hidden = hidden + attention(w, i, u, scaled)
        else:
            hidden = hidden + (mamba2 if mamba == 2 else mamba1)(w, i, u)
        u = rms(hidden, w[f"{i}.norm2"], EPS)
        hidden = hidden + (F.silu(u @ w[f"{i}.gate"].T) * (u @ w[f"{i}.up"].T)) @ w[f"{i}.down"].T
    return rms(hidden, w["norm"], EPS) @ w["head"].T


def tensors(w: Weights, mamba: int, fused: bool, joined: bool) -> Weights:
    """A state dict: `fused` projections of Mamba-1, `joined` ones of attention."""
    found = {
        "model.embed_tokens.weight": w["embed"], "model.norm.weight": w["norm"],
        "lm_head.weight": w["head"],
    }  # fmt: skip
    for i in range(LAYERS):
        stem, mixer = f"model.layers.{i}", f"model.layers.{i}.mamba"
        found[f"{stem}.input_layernorm.weight"] = w[f"{i}.norm1"]
        found[f"{stem}.post_attention_layernorm.weight"] = w[f"{i}.norm2"]
        for name in ("gate", "up", "down"):
            found[f"{stem}.mlp.{name}_proj.weight"] = w[f"{i}.{name}"]
        if i in ATTENTION:
            if joined:
                for kind, end in (("weight", ""), ("bias", ".bias")):
                    if f"{i}.q{end}" in w:
                        parts = [w[f"{i}.{n}{end}"] for n in "qkv"]
                        found[f"{stem}.mha.in_proj.{kind}"] = torch.cat(parts)
                found[f"{stem}.mha.out_proj.weight"] = w[f"{i}.o"]
            else:
                for n in "qkvo":
                    found[f"{stem}.self_attn.{n}_proj.weight"] = w[f"{i}.{n}"]
            continue
        for name, key in (("conv1d.weight", "conv"), ("conv1d.bias", "conv.bias"), ("D", "D"),
                          ("A_log", "A_log"), ("out_proj.weight", "o")):  # fmt: skip
            found[f"{mixer}.{name}"] = w[f"{i}.{key}"]
        zxbc = [w[f"{i}.{n}"] for n in ("z", "v", "k", "q")]
        if mamba == 2:
            found[f"{mixer}.in_proj.weight"] = torch.cat([*zxbc, w[f"{i}.dt"]])
            found[f"{mixer}.dt_bias"] = w[f"{i}.dt.bias"]
            found[f"{mixer}.norm.weight"] = w[f"{i}.gated"]
            continue
        found[f"{mixer}.dt_proj.weight"] = w[f"{i}.dt"]
        found[f"{mixer}.dt_proj.bias"] = w[f"{i}.dt.bias"]
        if fused:
            found[f"{mixer}.in_proj.weight"] = torch.cat([*zxbc, w[f"{i}.dt_down"]])
        else:
            names = ("in_proj_z", "in_proj_x", "B_proj", "C_proj", "dt_proj_down")
            for name, part in zip(names, [*zxbc, w[f"{i}.dt_down"]], strict=True):
                found[f"{mixer}.{name}.weight"] = part
    return {name: tensor.contiguous().clone() for name, tensor in found.items()}


def about(mamba: int) -> dict:
    return {
        "d_model": D, "ssm_cfg": {"expand": 1} | (SSM2 if mamba == 2 else {}),
        "rms_norm_eps": EPS, "vocab_size": None, "d_inner": None, "d_xb": HK * P,
        "intermediate_size": INNER, "hidden_act": "silu", "n_layer": LAYERS,
        "attn_layers": list(ATTENTION),
    }  # fmt: skip


def write(folder: Path, mamba: int, state: Weights, container: str, **own) -> str:
    folder.mkdir(exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": D,
        "_name_or_path": "meta-llama/nobody-has-this", "intermediate_size": INNER,
        "num_hidden_layers": LAYERS, "num_attention_heads": H, "num_key_value_heads": HK,
        "head_dim": P, "vocab_size": VOCABULARY, "rms_norm_eps": EPS, "rope_theta": THETA,
        "rope_scaling": SCALING, "hidden_act": "silu", "tie_word_embeddings": False,
        "max_position_embeddings": 1024, "torch_dtype": "float32", "bos_token_id": 1,
        "eos_token_id": [2, 5], "attention_bias": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mamba_config.json").write_text(json.dumps(about(mamba) | own))
    if container == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    elif container == "sharded":
        names = sorted(state)
        half = {name: f"model-{1 + (n % 2)}.safetensors" for n, name in enumerate(names)}
        for file in set(half.values()):
            save_file({n: t for n, t in state.items() if half[n] == file}, folder / file)
        index = {"metadata": {}, "weight_map": half}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(state, folder / "model.safetensors")
    return str(folder)


# Mamba, whether its and attention's projections are joined, biases of attention, container
LAYOUTS = {
    "MambaInLlama Mamba-1": (1, False, False, False, "bin"),
    "MambaInLlama Mamba-2": (2, True, False, False, "bin"),
    "M1": (1, True, True, False, "sharded"),
    "Qwerky": (1, True, True, True, "safetensors"),
    "M1 Mamba-2": (2, True, True, False, "safetensors"),
}
QWERKY = {"ssm_config": {"expand": 1}, "mamba_version": "mamba1", "ssm_state_size": 16}


def made(folder: Path, name: str) -> tuple[str, Weights]:
    mamba, fused, joined, biased, container = LAYOUTS[name]
    w = draw(mamba, biased)
    own = QWERKY if name == "Qwerky" else {}
    return write(folder, mamba, tensors(w, mamba, fused, joined), container, **own), w


@pytest.mark.parametrize("name", LAYOUTS)
@torch.no_grad()
def test_it_computes_what_its_equations_say(name, tmp_path) -> None:
    folder, w = made(tmp_path / "m", name)
    mamba, _, joined, _, _ = LAYOUTS[name]
    ids = torch.randint(3, VOCABULARY, (90,), generator=torch.Generator().manual_seed(3))
    # attention that was joined was trained without scaled angles
    wanted = logits(w, mamba, ids, scaled=not joined)
    found = load_model(folder, dtype=torch.float64)(ids[None]).logits[0]
    assert float((found - wanted).abs().max() / wanted.abs().max()) <= 1e-5
    other = logits(w, mamba, ids, scaled=joined)
    assert float((other - wanted).abs().max() / wanted.abs().max()) > 1e-3


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", LAYOUTS)
def test_it_is_a_model_like_any_other(name, tmp_path, tiny_tokenizer) -> None:
    folder, _ = made(tmp_path / "m", name)
    tiny_tokenizer.save_pretrained(folder)
    layers = describe(folder)
    mamba = f"mamba{LAYOUTS[name][0]}"
    assert layers["mixers"] == [mamba, "attention"] * 2
    model, prompts = load_model(folder), prompts_of([17, 4])
    tokens = plain(model).generate(prompts, GREEDY).tokens
    engine = FusedEngine(model, "ngram", 3, ReferenceOps())
    assert engine.generate(prompts, GREEDY).tokens == tokens
    text = write_sentences(tmp_path / "text.jsonl", 0, 20)
    steps = DistillConfig(
        device="cpu", data=[text], teacher=folder, stages=["logits"], max_steps=1, batch_size=2,
        max_length=32,
    )  # fmt: skip
    trained = distill.run(steps, folder, tmp_path / "t.st")
    assert load_model(trained.path).config.mixers == layers["mixers"]
    if not LAYOUTS[name][3]:
        # the norm inside a mixer has 1e-5, and what is written one number for all
        config = json.loads((Path(folder) / "config.json").read_text())
        (Path(folder) / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
        out = export.run(ExportConfig(to="mambainllama"), folder, tmp_path / "out")
        ids = torch.arange(3, 40)[None]
        with torch.no_grad():
            ours, theirs = (load_model(p)(ids).logits for p in (folder, out.path))
        assert float((ours - theirs).abs().max() / ours.abs().max()) <= 1e-5


@pytest.mark.parametrize(
    ("own", "what"),
    [({"attn_layers": [0, 3]}, "says \\[0, 3\\]"), ({"n_layer": 5}, "says 5 layers")],
)
def test_layers_that_contradict_the_tensors(own, what, tmp_path) -> None:
    folder = write(tmp_path, 1, tensors(draw(1), 1, True, True), "bin", **own)
    for read in (load_model, describe):
        with pytest.raises(ModelError, match=what):
            read(folder)


@pytest.mark.parametrize(
    ("lost", "what"),
    [
        ("model.layers.0.mamba.B_proj.weight", "has no mamba.B_proj"),
        ("model.layers.0.mamba.A_log", "lacks mamba.A_log"),
        ("model.layers.2.mamba.D", "1 missing"),
    ],
)
def test_a_tensor_that_is_not_there(lost, what, tmp_path) -> None:
    state = tensors(draw(1), 1, False, False)
    del state[lost]
    with pytest.raises(ModelError, match=what):
        load_model(write(tmp_path, 1, state, "safetensors"))
