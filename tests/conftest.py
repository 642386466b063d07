"""Tiny models and a tokenizer made in memory, for every test."""

import os
import signal
from collections import Counter

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not os.path.exists("/dev/nvidiactl"):
    # without a GPU Triton kernels run in its interpreter; read when triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

pytest_plugins = (
    "fixtures.command_line",
    "fixtures.hub_server",
    "fixtures.packed_rows",
    "fixtures.students",
    "fixtures.subjects",
    "fixtures.terminal",
    "fixtures.two_devices",
)

TEXT = (
    "the a of and to in is was he she it they said went saw river house door light water stone "
    "old new red blue small large one two three four five day night king queen tree bird"
)
WORDS = TEXT.split()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what the installed transformers cannot do."""
    if marker := item.get_closest_marker("since_transformers"):
        needed, why = marker.args
        found = version("transformers")
        if Version(found) < Version(needed):
            pytest.skip(f"transformers {found} {why}")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave every n-th case of a test that asks for it, so that ordinary runs take minutes."""
    seen: Counter[str] = Counter()
    for item in items:
        marker = item.get_closest_marker("one_in")
        # a GPU runs all: no interpreter makes its kernels slow
        if marker is None or os.environ.get("TRITON_INTERPRET") != "1":
            continue
        test = item.nodeid.partition("[")[0]
        if seen[test] % marker.args[0]:
            item.add_marker(pytest.mark.slow)
        seen[test] += 1


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


class _PlainProducts:
    """numpy, but a product sums each row by itself, as the units of a GPU do.

    BLAS may sum a row in another order when the matrix around it has other rows.
    """

    def __init__(self, numpy) -> None:
        self._numpy = numpy

    def __getattr__(self, name: str):
        return getattr(self._numpy, name)

    def matmul(self, a, b, dtype):
        rows = self._numpy.split(a, a.shape[-2], axis=-2)
        parts = [self._numpy.matmul(row, b, dtype=dtype) for row in rows]
        return self._numpy.concatenate(parts, axis=-2)


@pytest.fixture(scope="session", autouse=True)
def _interpreted_products() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        interpreter = pytest.importorskip("triton.runtime.interpreter")
        interpreter.np = _PlainProducts(interpreter.np)


@pytest.fixture(scope="session", autouse=True)
def _interruptible() -> None:
    """The processes that xdist starts ignore SIGINT, as what they start would."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _small_buffers() -> None:
    """Measure read bandwidth with 10 MB, which takes no time: no test goes by the result."""
    from mambactl.speed import bandwidth

    bandwidth.CPU_GIGABYTES = 0.01


@pytest.fixture(autouse=True)
def _as_loud_as_ever() -> None:
    """A command that ran quietly in this process must not silence the next test."""
    from mambactl import console

    console.set_verbosity(1)


def tiny_config(
    mixers: list[str], kept_heads: dict[int, tuple[int, ...]] | None = None, **overrides
):
    """A 4-head, 2-KV-head configuration with both Mamba settings filled in.

    `kept_heads`: of the layers that keep some, by layer; the first and the last take turns.
    """
    from mambactl.models.config import HybridConfig
    from mambactl.models.key_ring import WindowSettings
    from mambactl.models.mixers.mamba1 import mamba1_from_attention
    from mambactl.models.mixers.mamba2 import mamba2_from_attention
    from mambactl.models.mixers.mixed import KeptHeads
    from mambactl.models.mixers.registry import MIXERS

    fields = {
        "vocab_size": 97, "hidden_size": 48, "intermediate_size": 96,
        "num_hidden_layers": len(mixers), "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "rms_norm_eps": 1e-5, "max_position_embeddings": 1024,
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }  # fmt: skip
    settings = {k: overrides.pop(k) for k in list(MIXERS)[1:] if k in overrides}
    base = HybridConfig(**{**fields, **overrides})
    settings.setdefault("mamba2", mamba2_from_attention(base, proj_bias=True))
    if {"mamba2_window", "mamba2_mixed"} & set(mixers):
        settings.setdefault("mamba2_window", WindowSettings(window=7, sinks=3))
    settings.setdefault("mamba1", mamba1_from_attention(base, repeat_width=16, proj_bias=False))
    mixed = [index for index, name in enumerate(mixers) if name == "mamba2_mixed"]
    if mixed:
        count, whole = base.num_key_value_heads, settings["mamba2"]
        kept = kept_heads or {i: ((0,), (count - 1,))[n % 2] for n, i in enumerate(mixed)}
        sizes, settings["kept_heads"] = [whole] * len(mixers), [None] * len(mixers)
        for index in mixed:
            heads = mamba2_from_attention(base, True, kv_heads=count - len(kept[index]))
            sizes[index] = whole.with_heads_of(heads)
            settings["kept_heads"][index] = KeptHeads(kept[index])
        settings["mamba2"] = sizes
    return base.with_mixers(mixers, **settings)


def write_sentences(path: Path, seed: int, documents: int) -> str:
    """Sentences in which a word decides which few can follow, as jsonl."""
    import json

    import torch

    draw = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(documents):
        length = int(torch.randint(10, 60, (1,), generator=draw))
        word, words = 0, []
        for step in torch.randint(4, (length,), generator=draw).tolist():
            word = (3 * word + step) % len(WORDS)
            words.append(WORDS[word])
        rows.append({"text": " ".join(words)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="session")
def make_hybrid() -> Callable:
    """make_hybrid(mixers, seed=0, **config overrides) -> tiny fp32 HybridForCausalLM in eval mode.

    Weights are large enough that every token changes the state and logits are far from ties.
    """

    def make(mixers: list[str], seed: int = 0, **overrides):
        import torch

        from mambactl.models.hybrid import HybridForCausalLM

        generator = torch.Generator().manual_seed(seed)
        model = HybridForCausalLM(tiny_config(mixers, **overrides)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if name.endswith("A_log"):
                    parameter.copy_(noise * 0.5)
                elif name.endswith(("dt_bias", "dt_proj.bias")):
                    parameter.copy_(noise * 0.5 - 2)
                elif name.endswith("norm.weight") or name.endswith(".D"):
                    parameter.copy_(1 + 0.2 * noise)
                elif parameter.ndim == 1:
                    parameter.copy_(0.1 * noise)
                elif "conv1d" in name:
                    parameter.copy_(0.4 * noise)
                elif "embed" in name or "lm_head" in name:
                    parameter.copy_(noise)
                else:
                    parameter.copy_(1.2 * noise * parameter.shape[-1] ** -0.5)
        return model

    return make


def make_tokenizer():
    """A word-level tokenizer of 97 entries with a ChatML template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<|im_start|>", "<|im_end|>", "<unk>"]
    letters = list("abcdefghijklmnopqrstuvwxyz0123456789.,?!:-'")
    vocabulary = list(dict.fromkeys(special + WORDS + letters))[:97]
    vocabulary += [f"<extra{i}>" for i in range(97 - len(vocabulary))]
    model = models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>",
        pad_token="<pad>", unk_token="<unk>",
    )  # fmt: skip
    fast.chat_template = (
        "{% for m in messages %}<|im_start|> {{ m.role }} {{ m.content }} <|im_end|> {% endfor %}"
        "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
    )
    return fast


def write_llama(folder: Path, tokenizer) -> Path:
    """A random 4-layer Llama of 97 tokens and its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=48, intermediate_size=96, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-5,
        max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A word-level tokenizer of 97 entries with a ChatML template."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory, tiny_tokenizer) -> Path:
    """A folder with a random 4-layer Llama of 97 tokens and its tokenizer."""
    return write_llama(tmp_path_factory.mktemp("tiny") / "llama", tiny_tokenizer)


@pytest.fixture(scope="session")
def random_texts(tmp_path_factory) -> Path:
    """A JSONL file of 50 texts of random words, 10 to 59 words long."""
    import json

    import torch

    draw = torch.Generator().manual_seed(0)
    path = tmp_path_factory.mktemp("data") / "text.jsonl"
    rows = (torch.randint(len(WORDS), (n,), generator=draw) for n in range(10, 60))
    texts = [" ".join(WORDS[i] for i in row) for row in rows]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path
