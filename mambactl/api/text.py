"""Models in memory, and the text they write."""

import os
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from mambactl import console
from mambactl.api.calls import Spec, spec_of
from mambactl.api.signatures import with_options
from mambactl.checkpoint.head_layout import is_draft_head
from mambactl.checkpoint.load import load_lineage, load_model, load_tokenizer
from mambactl.commands import configure
from mambactl.decode.backend import NGRAM, AnyEngine, Draft, K
from mambactl.decode.engine import Finish, Generation
from mambactl.decode.head_files import load_head
from mambactl.decode.prompts import Prompt, encode_all
from mambactl.decode.sampler import SamplingParams
from mambactl.decode.stats import DecodeStats
from mambactl.errors import UsageError
from mambactl.generation import decoding
from mambactl.generation.detokenizer import Detokenizer
from mambactl.generation.dialogue import Chat
from mambactl.generation.on_demand import on_demand
from mambactl.models.byte_weights import for_decoding, require_weights
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.options import PREFIX_CACHE_GB, ChatConfig, GenerateConfig, ServeConfig
from mambactl.options.fields import StoredWeights
from mambactl.options.generation import require_model_draft
from mambactl.present import of_kind
from mambactl.ranks import placement

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from mambactl.serving.running import Server

GREEDY = SamplingParams()
# what SamplingParams shares with the options of the command
SAMPLING = ("temperature", "top_k", "top_p", "max_new_tokens", "seed")
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class _Engines:
    """The engine used last, whose GPU memory and graphs the next call with the same draft needs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: tuple[decoding.Setup, AnyEngine] | None = None

    def take(self, setup: decoding.Setup) -> AnyEngine | None:
        """An engine for the same as `setup`, which is then nobody else's; None without one."""
        with self._lock:
            kept, self._kept = self._kept, None
        if kept is None or kept[0].draft is not setup.draft:
            return None
        before, now = ((each.k, each.folder, each.ngram) for each in (kept[0], setup))
        return kept[1] if before == now else None

    def put(self, setup: decoding.Setup, engine: AnyEngine) -> None:
        """Keep an engine that nobody uses any more."""
        with self._lock:
            # prompts may be long
            self._kept = (replace(setup, prompts=[]), engine)


@dataclass(frozen=True, eq=False)
class Model:
    """A checkpoint in memory, as `load` returns it.

    `source` is what was loaded, `model` a transformers model in evaluation mode, `lineage` how
    mambactl made it (None for a checkpoint of others). `generate` packs the weights at its first
    call: what is changed in `model` later is not seen. `rounded`: a CPU may read them in bfloat16;
    `weights`: as `load` was asked for.
    """

    source: str
    model: HybridForCausalLM
    tokenizer: "PreTrainedTokenizerFast"
    lineage: dict[str, object] | None
    rounded: bool = False
    weights: StoredWeights = "auto"
    _engines: _Engines = field(default_factory=_Engines, init=False, repr=False)

    @contextmanager
    def engine(self, setup: decoding.Setup) -> Iterator[AnyEngine]:
        """Engine for exclusive use inside the block, kept for the next call."""
        engine = self._engines.take(setup) or setup.engine()
        try:
            yield engine
        except GeneratorExit:
            # a stream that was closed: its engine came to an end before
            self._engines.put(setup, engine)
            raise
        self._engines.put(setup, engine)


@dataclass(frozen=True)
class Completion:
    """A generated continuation of one prompt.

    `tokens` include the one that ends the text, `finish` is `eos` or `length`, and `stats` are
    counts and times of the whole call that the prompt was part of.
    """

    text: str
    tokens: tuple[int, ...]
    finish: Finish
    stats: DecodeStats = field(repr=False)


def load(
    model: Spec,
    *,
    device: str = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: bool = False,
    weights: StoredWeights = "auto",
) -> Model:
    """Load a checkpoint for use in Python: a folder, .st file, GGUF, hub id or alias.

    `device` is cpu, cuda, cuda:1 or auto; `dtype` is that of the weights in memory, where auto is
    bfloat16 on capable GPUs and else float32, of which decoding may read bfloat16 copies. Code that
    a checkpoint ships runs only with `trust_remote_code`. `weights` "int8" and "fp8" hold linear
    layers in 8 bits on a GPU; a CPU rounds them to the same numbers.

    Raises ModelError for a model that is missing, incomplete or not supported, UsageError for an
    unknown device and ResourceError for one that this machine has not, or that cannot decode with
    such weights.

    >>> student = mambactl.load("student.st", device="cpu")
    >>> student.model.config.mixers
    ['mamba2', 'attention', 'mamba2', 'attention']
    >>> student.tokenizer.decode(student.tokenizer("the old house").input_ids)
    'the old house'
    >>> student.lineage["stage"]
    'convert'
    """
    source = spec_of(model)
    options = {"device": device, "dtype": dtype, "weights": weights}
    where, kind = placement(configure("generate", options))
    require_weights(weights, where)
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    loaded = load_model(source, where, kind, trust_remote_code)
    if weights != "auto":
        loaded = for_decoding(loaded, weights, source)
    return Model(source, loaded, tokenizer, load_lineage(source), dtype == "auto", weights)


def generate(
    model: Model | Spec,
    prompts: str | Sequence[str],
    params: SamplingParams = GREEDY,
    *,
    draft: Model | Spec | None = None,
    ngram: bool = False,
    k: K = "auto",
    batch_size: int = 1,
    chat: bool = True,
    ignore_eos: bool = False,
    prefix_cache: Spec | None = None,
    prefix_cache_gb: float = PREFIX_CACHE_GB,
) -> list[Completion]:
    """Continue prompts, plainly or with a draft; the text is that of `mambactl generate`.

    `model` and `draft` are loaded models, or what `load` takes; a draft may also be `"ngram"`,
    which repeats the text's own turns of phrase; with `ngram` that is done beside another draft,
    where it does better. `params` say how tokens are chosen; the model's
    own tokens end a text unless `params` names others; with `ignore_eos` none does. `k` tokens are
    drafted in a step, auto is what is fastest. `batch_size` prompts are decoded together. With
    `chat` a prompt is a message inside the model's chat template, if it has one. `prefix_cache` is
    a folder of up to `prefix_cache_gb` GB that keeps what the model holds after beginnings of
    prompts, for later processes.

    Raises UsageError for an empty prompt or an option out of bounds, ModelError for a model that
    cannot be used or a draft of another vocabulary, OutputError for a folder that cannot be
    written.

    >>> student = mambactl.load("student.st", device="cpu")
    >>> params = mambactl.SamplingParams(max_new_tokens=4)
    >>> found = mambactl.generate(student, ["the old house", "the red door"], params)
    >>> [(len(each.tokens), each.finish) for each in found]
    [(4, 'length'), (4, 'length')]
    >>> again = mambactl.generate(student, "the old house", params, draft="ngram", k=3)
    >>> again[0].text == found[0].text
    True
    """
    if not isinstance(prompts, Sequence):
        raise UsageError(f"prompts are {prompts!r}", "give a text, or a list of texts")
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    options = {
        "ngram": ngram,
        "k": k,
        "batch_size": batch_size,
        "chat": chat,
        "ignore_eos": ignore_eos,
        "prefix_cache": prefix_cache,
        "prefix_cache_gb": prefix_cache_gb,
    }
    handle, setup = _prepared(model, texts, params, draft, options)
    with handle.engine(setup) as engine:
        result = decoding.decode(engine, setup.prompts, setup.params, batch_size)
    return [
        Completion(setup.text(tokens), tuple(tokens), finish, result.stats)
        for tokens, finish in zip(result.tokens, result.finish, strict=True)
    ]


def stream(
    model: Model | Spec,
    prompt: str,
    params: SamplingParams = GREEDY,
    *,
    draft: Model | Spec | None = None,
    ngram: bool = False,
    k: K = "auto",
    chat: bool = True,
    ignore_eos: bool = False,
    prefix_cache: Spec | None = None,
    prefix_cache_gb: float = PREFIX_CACHE_GB,
) -> Generator[str, None, None]:
    """Yield pieces of text as tokens arrive; joined they are the text of `generate`.

    Arguments and errors are those of `generate`, and errors of the arguments are raised at once.
    A piece ends with a whole character. Between two pieces decoding stands still, and closing the
    iterator, or leaving it to the garbage collector, ends it.

    >>> params = mambactl.SamplingParams(max_new_tokens=4)
    >>> pieces = mambactl.stream("student.st", "the old house", params)
    >>> text = "".join(pieces)
    >>> text == mambactl.generate("student.st", "the old house", params)[0].text
    True
    """
    options = {
        "ngram": ngram,
        "k": k,
        "chat": chat,
        "ignore_eos": ignore_eos,
        "prefix_cache": prefix_cache,
        "prefix_cache_gb": prefix_cache_gb,
    }
    return _pieces(*_prepared(model, [prompt], params, draft, options))


@with_options("chat", ChatConfig)
def chat(config: ChatConfig, model: Spec) -> Chat:
    """Open a conversation, in which a message is read behind the state that the others left.

    `say` sends a message and returns the answer, whose text is that of `generate` for the same
    messages; `messages`, `system`, `reset` and `describe` are what their names say. `close` it, or
    leave a `with` block, to end the process that renders the chat template.

    Raises UsageError for messages that the chat template refuses, ModelError for a model that
    cannot be used or a draft of another vocabulary.

    >>> with mambactl.chat("student.st", device="cpu", max_new_tokens=4) as chat:
    ...     first = chat.say("the old house")
    ...     second = chat.say("the red door")
    >>> [message["role"] for message in chat.messages]
    ['user', 'assistant', 'user', 'assistant']
    >>> second.stats.prompt_shared > 0
    True
    """
    config.require_coherent()
    return Chat.open(config, spec_of(model))


@with_options("serve", ServeConfig)
def serve(config: ServeConfig, model: Spec) -> "Server":
    """Serve a model to clients of the OpenAI API, beside the caller, until it is closed.

    `url` is where clients find it. `close` it, or leave a `with` block: running answers are
    finished then, for `grace` seconds.

    Raises ResourceError where nothing can listen, ModelError for a model that cannot be used.

    >>> from urllib.request import urlopen
    >>> with mambactl.serve("student.st", device="cpu", port=0) as server:
    ...     urlopen(f"{server.url}/models").status
    200
    """
    # an extra brings what it needs
    from mambactl.serving.running import Server

    return Server(config, spec_of(model), lambda url: console.log(f"serving at {url}")).start()


def _prepared(
    model: Model | Spec,
    texts: Sequence[str],
    params: SamplingParams,
    draft: Model | Spec | None,
    options: Mapping[str, object],
) -> tuple[Model, decoding.Setup]:
    """The model, and the prompts with the sampling; what is wrong shows before weights are read."""
    if not isinstance(params, SamplingParams):
        raise UsageError(f"params are {params!r}", "give mambactl.SamplingParams(...)")
    given = {name: getattr(params, name) for name in SAMPLING}
    typed = {k: os.fspath(v) if isinstance(v, os.PathLike) else v for k, v in options.items()}
    config = of_kind(GenerateConfig, configure("generate", {**given, **typed}))
    for number, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise UsageError(f"prompt {number} is empty", "give some text")
    require_model_draft(config.ngram, draft)
    folder = decoding.prefix_folder(config)
    own: Draft = None
    if draft is not None and draft != NGRAM:
        decoding.require_draft_tokens(_source(model), _source(draft))
    handle = _loaded(model)
    if draft is not None:
        own = NGRAM if draft == NGRAM else _beside(draft, handle)
    prompts = encode_all(map(Prompt.of, texts), handle.tokenizer, config.chat)
    setup = decoding.assemble(config, handle.model, handle.tokenizer, own, prompts)
    if params.eos_token_ids and not config.ignore_eos:
        setup = replace(setup, params=params)
    return handle, replace(setup, rounded=handle.rounded, folder=folder)


def _beside(draft: Model | Spec, handle: Model) -> Draft:
    """A draft on the device of its target; one that is loaded here has the target's type, too."""
    target, weights = handle.model, handle.weights
    if not isinstance(draft, Model):
        spec = spec_of(draft)
        if not is_draft_head(spec):
            return for_decoding(load_model(spec, target.device, target.dtype), weights, spec)
        if weights != "auto":
            raise UsageError(
                f"a draft head knows its target by the stored weights, not by those in {weights}",
                "load the model without weights, or give another draft",
            )
        return load_head(spec, target, handle.source)
    if draft.model.device != target.device:
        raise UsageError(
            f"the draft is on {draft.model.device}, the model on {target.device}",
            "load both with the same device",
        )
    return draft.model


def _source(model: Model | Spec) -> str:
    return model.source if isinstance(model, Model) else spec_of(model)


def _loaded(model: Model | Spec) -> Model:
    return model if isinstance(model, Model) else load(model)


def _pieces(model: Model, setup: decoding.Setup) -> Generator[str, None, None]:
    text = Detokenizer(setup.tokenizer)
    with model.engine(setup) as engine:

        def work(listen: Callable[[list[int]], bool]) -> Generation:
            return engine.generate(setup.prompts, setup.params, lambda _, new: listen(new))

        for new in on_demand(work):
            if piece := text.add(new):
                yield piece
        if piece := text.finish():
            yield piece
