"""Compare what an exported model computes with what the original does, in fp32.

Logits are compared on prompts and their greedy continuations, and the continuations themselves,
which also run what a model keeps between tokens.
"""

import gc
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor

from mambactl import console
from mambactl.checkpoint.load import load_model, load_tokenizer
from mambactl.decode.prompts import BUILTIN
from mambactl.errors import CheckError, ModelError, ResourceError
from mambactl.export.exported_form import Origin
from mambactl.files import Source, gib

MEMORY = Path("/proc/meminfo")
_PROMPTS, _PROMPT_TOKENS, _NEW_TOKENS = 4, 48, 16
# of the largest logit
CLOSE = 1e-4
# nats per token that a rounding of the weights may cost, by the type they are rounded to
ROUNDED = {"float16": 1e-3, "bfloat16": 1e-3, "q8_0": 2e-2}


class CausalModel(Protocol):
    """A model of this process: ours, or of transformers."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        """An output with `logits` [B, T, V]."""
        ...


@dataclass(frozen=True)
class Difference:
    """Difference between two models on the same tokens.

    `logits` is the largest difference, `scale` the largest logit, `kl` in nats per token, and
    `texts` the number of greedy continuations that differ where no two tokens tie.
    """

    prompts: int
    tokens: int
    logits: float
    scale: float
    kl: float
    texts: int


@dataclass(frozen=True)
class _Answers:
    """Logits [T, V] on each prompt with its continuation, and how many tokens the prompt has."""

    rows: list[Tensor]
    logits: list[Tensor]
    lengths: list[int]


def compare(
    origin: Origin, source: Source, load: Callable[[], CausalModel], rounded_to: str | None
) -> Difference | None:
    """The difference between a checkpoint and what `load` reads; None where memory is too small.

    Raises CheckError where it is larger than rounding allows: `rounded_to` names the type of the
    exported weights where that is another one than the checkpoint's.
    """
    if not _fits(origin):
        return None
    prompts = _prompts(origin)
    console.log("reading the original again, in fp32")
    with console.progress("original", len(prompts)) as task:
        answers = _answers(load_model(source, dtype=torch.float32), prompts, task)
    # one model at a time
    gc.collect()
    console.log("reading what was written, and comparing logits and text")
    with console.progress("exported", len(prompts)) as task:
        difference = _difference(answers, load(), rounded_to is None, task)
    _judge(difference, rounded_to)
    return difference


def load_by_transformers(path: Path) -> CausalModel:
    """Load a folder with transformers' own classes, in fp32."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    shows = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        )
    finally:
        if shows:
            logging.enable_progress_bar()
    return model.eval()


def require_loader(since: str) -> None:
    """Raise ResourceError where transformers is older than `since`, and cannot compute a form."""
    found = version("transformers")
    if Version(found) < Version(since):
        raise ResourceError(
            f"transformers {found} loads this form and computes something else, so that it cannot "
            "be checked here",
            f'pip install "transformers>={since}", or add --no-check',
        )


def _fits(origin: Origin) -> bool:
    """True if memory holds the model in fp32, or if the free memory is unknown."""
    size = 4 * sum(origin.described(name).numel() for name in origin.names)
    free = _available()
    if free is not None and size > free:
        console.warn(f"not checked: the model takes {gib(size)} in fp32, {gib(free)} are free")
        return False
    return True


def _available() -> int | None:
    """Bytes of memory that a process may still take, on Linux."""
    with suppress(OSError):
        found = re.search(r"^MemAvailable:\s+(\d+) kB$", MEMORY.read_text(), re.MULTILINE)
        return int(found[1]) * 1024 if found else None
    return None


def _prompts(origin: Origin) -> list[Tensor]:
    """Token ids [T] of built-in prompts, or random ones for a model without a tokenizer."""
    size, found = origin.config.vocab_size, []
    with suppress(ModelError):
        tokenizer = load_tokenizer(origin.spec)
        texts = [prompt.messages[0]["content"] for prompt in BUILTIN[:_PROMPTS]]
        rows = (torch.tensor(tokenizer(text)["input_ids"][:_PROMPT_TOKENS]) for text in texts)
        found = [row for row in rows if len(row) and int(row.max()) < size]
    draw = torch.Generator().manual_seed(0)
    return found or list(torch.randint(size, (_PROMPTS, _PROMPT_TOKENS), generator=draw))


@torch.no_grad()
def _answers(model: CausalModel, prompts: list[Tensor], task: console.Task) -> _Answers:
    rows, logits = [], []
    for prompt in prompts:
        rows.append(_continued(model, prompt))
        logits.append(model(rows[-1][None]).logits[0].float())
        task.advance()
    return _Answers(rows, logits, [len(prompt) for prompt in prompts])


def _continued(model: CausalModel, row: Tensor) -> Tensor:
    ids = row[None]
    # of a mixin, which not every class of transformers has
    generate: Callable[..., Tensor] = getattr(model, "generate")  # noqa: B009
    found = generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=_NEW_TOKENS,
        do_sample=False,
        # none of a model's own: every continuation has the same length
        eos_token_id=None,
        pad_token_id=0,
    )
    return found[0]


@torch.no_grad()
def _difference(
    answers: _Answers, model: CausalModel, exact: bool, task: console.Task
) -> Difference:
    # of each prompt, as tensors: the maximum of numbers would leave out one that is none
    apart, divergences, differing = [], [], 0
    for row, expected, length in zip(answers.rows, answers.logits, answers.lengths, strict=True):
        logits = model(row[None]).logits[0].float()
        apart.append((logits - expected).abs().max())
        ours, theirs = expected.log_softmax(-1), logits.log_softmax(-1)
        divergences.append(F.kl_div(theirs, ours, log_target=True, reduction="sum"))
        if exact:
            differing += _differs(_continued(model, row[:length]), row, expected)
        task.advance()
    tokens = sum(map(len, answers.rows))
    # rounding may make it negative
    kl = (torch.stack(divergences).sum() / tokens).clamp(min=0)
    scale = max(float(expected.abs().max()) for expected in answers.logits)
    largest = float(torch.stack(apart).max())
    return Difference(len(answers.rows), tokens, largest, scale, float(kl), differing)


def _differs(found: Tensor, row: Tensor, logits: Tensor) -> bool:
    """True if a continuation departs from the expected one at a token that is no tie."""
    wrong = (found != row).nonzero()
    if not len(wrong):
        return False
    # of the token before decides
    first, second = logits[int(wrong[0]) - 1].topk(2).values.tolist()
    return first - second > CLOSE * max(1.0, abs(first))


def _judge(found: Difference, rounded_to: str | None) -> None:
    # a number that is none is above every limit
    if rounded_to is not None:
        if not found.kl <= ROUNDED[rounded_to]:
            raise _failed(f"is {found.kl:.3g} nats per token from it, not {ROUNDED[rounded_to]}")
        return
    if not found.logits <= CLOSE * max(1.0, found.scale):
        raise _failed(f"has logits that differ by {found.logits:.3g} (of {found.scale:.3g})")
    if found.texts:
        raise _failed(f"continues {found.texts} of {found.prompts} prompts in another way")


def _failed(what: str) -> CheckError:
    return CheckError(
        f"the exported model {what}", "nothing was written; --no-check writes it nevertheless"
    )
