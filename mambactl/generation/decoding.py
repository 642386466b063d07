"""Parts that `generate` and `spec-decode` share: prompts, target, draft, runs over many prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mambactl import console
from mambactl.checkpoint import vocabulary
from mambactl.checkpoint.contents import describe
from mambactl.checkpoint.head_layout import describe_head, is_draft_head
from mambactl.checkpoint.load import load_model, load_tokenizer
from mambactl.checkpoint.vocabulary import require_same_tokens
from mambactl.data.bad_rows import BadRows
from mambactl.data.conversations import read_conversations
from mambactl.data.row_files import require_prompts
from mambactl.decode.backend import NGRAM, AnyEngine, Draft, K, make_engine
from mambactl.decode.engine import Generation, OnTokens
from mambactl.decode.head_files import load_head
from mambactl.decode.prefix_files import GB, PrefixFolder
from mambactl.decode.prompts import BUILTIN, Prompt, encode_all
from mambactl.decode.sampler import SamplingParams
from mambactl.decode.stats import DecodeStats
from mambactl.errors import ModelError, UsageError
from mambactl.generation.detokenizer import text_of
from mambactl.models.byte_weights import for_decoding, require_weights
from mambactl.models.config import HybridConfig
from mambactl.models.device_map import Rooms
from mambactl.models.draft_head import DraftHead
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.options import (
    BenchConfig,
    PromptConfig,
    ServeConfig,
    SharedPromptConfig,
    TokenConfig,
)
from mambactl.ranks import placement

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Setup:
    """A target with its encoded prompts, its draft and how tokens are chosen."""

    target: HybridForCausalLM
    tokenizer: "PreTrainedTokenizerBase"
    draft: Draft
    k: K
    prompts: list[list[int]]
    params: SamplingParams
    # whether a CPU may read the weights in bfloat16 copies
    rounded: bool = False
    folder: PrefixFolder | None = None
    # beside a draft, tokens are copied where the text repeats itself
    ngram: bool = False

    def engine(self, plain: bool = False, exact: bool = False, share: bool = True) -> AnyEngine:
        """The engine that was asked for, or one for plain decoding."""
        if isinstance(self.draft, DraftHead) and self.folder is not None:
            console.warn("--prefix-cache gives nothing: a draft head reads prompts from the start")
        if plain or self.draft is None:
            return make_engine(self.target, None, 0, exact, share, self.rounded, self.folder)
        rest = (share, self.rounded, self.folder, self.ngram)
        return make_engine(self.target, self.draft, self.k, exact, *rest)

    def text(self, tokens: Sequence[int]) -> str:
        """Readable text of new tokens, without special ones."""
        return text_of(self.tokenizer, tokens)


def read(config: PromptConfig) -> list[Prompt]:
    """The prompts that a configuration asks for, or the built-in set where it names none."""
    if config.prompts is not None:
        return read_prompts(config.prompts)
    if config.prompt is not None:
        return [Prompt.of(config.prompt)]
    return list(BUILTIN)


def read_prompts(path: str) -> list[Prompt]:
    """The first question of every row of a data set; raises UsageError naming the row."""
    bad = BadRows()
    found = read_conversations([require_prompts(path)], bad=bad)
    if bad.found:
        first = bad.found[0]
        raise UsageError(f"{first.where}: {first.problem}", hint=first.cure)
    return [
        Prompt(each.opening, str(each.about.get("category") or ""), each.tools, each.template)
        for each in found
    ]


def prefix_folder(config: SharedPromptConfig) -> PrefixFolder | None:
    """The folder of `--prefix-cache`; raises OutputError where nothing can be written into it."""
    config.require_folder_for_size()
    if config.prefix_cache is None:
        return None
    path = Path(config.prefix_cache).expanduser()
    folder = PrefixFolder(path, int(config.prefix_cache_gb * GB))
    folder.prepare()
    return folder


def prepare(config: PromptConfig, source: str, prompts: Sequence[Prompt]) -> Setup:
    """Load target, tokenizer and draft; raises ModelError before any weight of a misfit is read."""
    tokenizer = load_tokenizer(source, trust_remote_code=config.trust_remote_code)
    require_draft(config, source)
    encoded = encode_all(prompts, tokenizer, config.chat)
    return assemble(config, *load_both(config, source, tokenizer), encoded)


def load_both(
    config: TokenConfig | ServeConfig, source: str, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[HybridForCausalLM, "PreTrainedTokenizerBase", Draft]:
    """Target, its tokenizer and draft, on the device and in the type that are asked for."""
    device, dtype = placement(config)
    require_weights(config.weights, device)
    target = load_model(source, device=device, dtype=dtype, rooms=Rooms.of(config))
    draft = config.draft
    if draft not in (None, NGRAM) and is_draft_head(draft):
        # before the weights that it was made for are rounded
        head = load_head(draft, target, source)
        return for_decoding(target, config.weights, source), tokenizer, head
    target = for_decoding(target, config.weights, source)
    if draft not in (None, NGRAM):
        # in what the target leaves
        model = load_model(draft, device=device, dtype=dtype, rooms=Rooms.of(config))
        draft = for_decoding(model, config.weights, draft)
    return target, tokenizer, draft


def assemble(
    config: TokenConfig,
    target: HybridForCausalLM,
    tokenizer: "PreTrainedTokenizerBase",
    draft: Draft,
    prompts: list[list[int]],
) -> Setup:
    """Models that are loaded and prompts that are encoded, with the sampling of `config`.

    Raises ModelError for a token that the target does not know.
    """
    for prompt in prompts:
        size = target.config.vocab_size
        if problem := vocabulary.beyond_embedding(prompt, size, tokenizer):
            raise ModelError(problem, "its tokenizer belongs to another model")
    params = SamplingParams(
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        max_new_tokens=config.max_new_tokens,
        eos_token_ids=() if config.ignore_eos else end_tokens(target, tokenizer),
        seed=config.seed,
    )
    longest = max(map(len, prompts), default=0) + config.max_new_tokens
    warn_beyond_positions(target.config, longest)
    rounded = config.dtype == "auto"
    return Setup(target, tokenizer, draft, config.k, prompts, params, rounded, ngram=config.ngram)


def require_draft(config: TokenConfig | BenchConfig | ServeConfig, source: str) -> None:
    """Raise ModelError when the draft means other tokens than the target."""
    if config.draft not in (None, NGRAM):
        require_draft_tokens(source, config.draft, config.trust_remote_code)


def require_draft_tokens(source: str, draft: str, trust_remote_code: bool = False) -> None:
    """Raise ModelError when a draft model means other tokens than the target.

    The tokens of a draft head are those of its target, by whose weights it is checked later.
    """
    if is_draft_head(draft):
        return
    hint = "take a draft of the target's family, or --draft ngram"
    require_same_tokens(source, draft, "draft", hint, False, trust_remote_code)


def end_tokens(target: HybridForCausalLM, tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """Every id that ends a text: of the generation config, the model config and the tokenizer."""
    holders = (target.generation_config, target.config, tokenizer)
    return vocabulary.end_tokens(*(getattr(one, "eos_token_id", None) for one in holders))


def decode(
    engine: AnyEngine,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    batch_size: int,
    on_tokens: OnTokens = lambda number, new: None,
) -> Generation:
    """Continue every prompt, `batch_size` at a time; randomness follows a prompt's own number.

    `on_tokens` hears the number of a prompt and the tokens that a step added to it.
    """
    whole = Generation([], [])
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        keys = range(start, start + len(batch))
        part = engine.generate(batch, params, _from(start, on_tokens), keys)
        whole.tokens.extend(part.tokens)
        whole.finish.extend(part.finish)
        whole.stats.add(part.stats)
    return whole


def from_files(given: int, tokens: int, prefix_cache: str) -> str:
    """Sentence with the number of prompt tokens that came from `--prefix-cache`."""
    return f"{given:,} of {tokens:,} prompt tokens from {prefix_cache}"


def _from(start: int, on_tokens: OnTokens) -> OnTokens:
    return lambda row, new: on_tokens(start + row, new)


def plan(config: PromptConfig, source: str, prompts: Sequence[Prompt]) -> dict[str, object]:
    """Dry run: models, prompts and numbers of tokens; reads headers and tokenizers only."""
    tokenizer = load_tokenizer(source, trust_remote_code=config.trust_remote_code)
    models = plan_models(config, source)
    tokens = [len(ids) for ids in encode_all(prompts, tokenizer, config.chat)]
    return models | {
        "prompts": len(prompts),
        "prompt_tokens": sum(tokens),
        "new_tokens_at_most": len(prompts) * config.max_new_tokens,
    }


def plan_models(config: TokenConfig | ServeConfig, source: str) -> dict[str, object]:
    """Dry run: the models that would decode, and the device; reads headers only."""
    device, dtype = placement(config)
    require_weights(config.weights, device)
    require_draft(config, source)
    target = describe(source)
    draft = None
    if config.draft not in (None, NGRAM):
        draft = (describe_head if is_draft_head(config.draft) else describe)(config.draft)
    return {
        "source": target["checkpoint"],
        "parameters": target["parameters"],
        "mixers": target["mixers"],
        "draft": draft["checkpoint"] if draft else config.draft,
        "draft_parameters": draft and draft["parameters"],
        "k": config.k if config.draft else 0,
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "weights": config.weights,
    }


def summary(stats: DecodeStats, prefix_cache: str | None = None) -> str:
    """Tokens read and written, and how fast, in one line; with what files of a folder gave."""
    parts = [f"{stats.prompt_tokens} prompt tokens in {stats.seconds['prefill']:.2f} s"]
    if prefix_cache is not None:
        given = stats.prompt_from_files, stats.prompt_tokens
        parts.append(from_files(*given, prefix_cache))
    parts.append(f"{stats.tokens} tokens at {stats.tokens_per_second:.1f} tokens/s")
    if stats.drafted:
        parts.append(f"{stats.tokens_per_step:.2f} tokens per step")
        parts.append(f"{stats.acceptance:.0%} of {stats.drafted} drafted tokens accepted")
    return ", ".join(parts)


def warn_beyond_positions(config: HybridConfig, longest: int, name: str = "this model") -> None:
    """Warn where rows of up to `longest` tokens have positions that a model was not made for."""
    limit = config.max_position_embeddings
    if config.attends and longest > limit:
        console.warn(f"{longest} tokens are more than the {limit} {name} was made for")
