"""Chooses the engine: the GPU's kernels where they run, the PyTorch reference everywhere else."""

from collections.abc import Sequence
from contextlib import suppress
from functools import cache, partial
from typing import TYPE_CHECKING, Literal, Protocol

import torch

from mambactl import console
from mambactl.decode.conversation import Conversation
from mambactl.decode.copying import Copying, weight_share
from mambactl.decode.drafters import Drafter, ModelDrafter, NgramDrafter
from mambactl.decode.engine import Engine, Generation, OnTokens
from mambactl.decode.head_drafter import HeadDrafter
from mambactl.decode.open_batch import OpenBatch
from mambactl.decode.prefix_files import PrefixFolder
from mambactl.decode.row_by_row import RowByRow
from mambactl.decode.sampler import SamplingParams
from mambactl.kernels.dispatch import switch, triton_missing
from mambactl.models.byte_weights import mean_bytes
from mambactl.models.device_map import devices_of
from mambactl.models.draft_head import DraftHead, DraftModel
from mambactl.models.hybrid import HybridForCausalLM

if TYPE_CHECKING:
    from mambactl.decode.gpu.fused_engine import FusedEngine

NGRAM = "ngram"
# what "auto" means where nothing is measured
REFERENCE_K = 4

Draft = DraftModel | Literal["ngram"]
K = int | Literal["auto"]


class AnyEngine(Protocol):
    """Protocol of a decoding engine on any device."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        on_tokens: OnTokens | None = None,
        keys: Sequence[int] | None = None,
    ) -> Generation:
        """Continue every prompt; see `decode.engine.Engine.generate`."""
        ...

    def converse(self) -> Conversation:
        """Treat later prompts as one conversation, in which each is read from the last one on."""
        ...


def why_not(device: torch.device) -> str | None:
    """Reason that the GPU kernels cannot decode on a device; None if they can."""
    return triton_missing(device)


def make_engine(
    target: HybridForCausalLM,
    draft: Draft,
    k: K,
    exact: bool = False,
    share: bool = True,
    rounded: bool = False,
    folder: PrefixFolder | None = None,
    copying: bool = False,
) -> "Engine | FusedEngine":
    """An engine for `target` with `draft` (a model, "ngram" or None, which needs k = 0).

    `exact`: passes of few rows compute every row the same way however many rows there are, so that
    speculative and plain decoding agree bit for bit. `share`: what prompts, also of several calls,
    begin with together is read once; without it every call does the same work. `rounded`: a CPU
    that multiplies bfloat16 may read copies of fp32 weights in that type. `folder`: files in it
    give beginnings that earlier processes read, and new ones are kept there. `copying`: beside a
    model or a head, drafts are copied where the text repeats itself. Whether both models mean the
    same tokens is the caller's to check: their vocabularies may differ by padding.
    """
    if target.device.type == "cpu":
        engine = _on_cpu(target, draft, k, share, rounded and not exact, folder, copying)
        if engine is not None:
            return engine
    reason = why_not(target.device) or _several_devices(target, draft)
    if reason is None:
        from mambactl.decode.gpu.fused_engine import FusedEngine
        from mambactl.kernels.decode.triton.ops import TritonOps
        from mambactl.models.packed import NotSupported

        try:
            ops = TritonOps.for_model(target, exact)
            return FusedEngine(target, draft, k, ops, share, folder, copying)
        except NotSupported as error:
            reason = f"they do not support {error}"
    if target.device.type == "cuda":
        _say_once(f"GPU decode kernels are off ({reason}); the PyTorch reference decodes")
    k = REFERENCE_K if k == "auto" else k
    beside = copying and draft is not None and not isinstance(draft, str)
    copies = Copying(weight_share(draft, target), k) if beside else None
    return Engine(target, _drafter(draft, target), k, share, folder, copies)


def open_batch(
    target: HybridForCausalLM,
    draft: Draft,
    k: int,
    rows: int,
    tokens: int,
    eos: Sequence[int],
    rounded: bool = False,
) -> OpenBatch:
    """Batch of at most `rows` rows of `tokens` tokens, which join and leave between steps.

    Arguments otherwise as of `make_engine`; `eos` are the tokens that end a row.
    """
    engine = make_engine(target, draft, k, share=False, rounded=rounded)
    if isinstance(engine, Engine):
        return RowByRow(target, partial(_drafter, draft, target), k, rows, eos)
    return engine.open(rows, tokens, eos)


def _on_cpu(
    target: HybridForCausalLM,
    draft: Draft,
    k: K,
    share: bool,
    rounded: bool,
    folder: PrefixFolder | None,
    copying: bool,
) -> "FusedEngine | None":
    """The engine of whole steps with operations for a CPU, where they can run the models."""
    own = draft.body if isinstance(draft, DraftHead) else draft
    models = [model for model in (target, own) if isinstance(model, HybridForCausalLM)]
    fits = all(model.dtype == torch.float32 for model in models)
    if switch() or not fits:
        return None
    from mambactl.decode.gpu.fused_engine import FusedEngine
    from mambactl.kernels.decode.cpu.cpu_ops import CpuOps
    from mambactl.kernels.decode.cpu.products import computes_bfloat16
    from mambactl.models.packed import NotSupported

    with suppress(NotSupported):
        ops = CpuOps(rounded and computes_bfloat16())
        return FusedEngine(target, draft, k, ops, share, folder, copying)


def weight_bytes(engine: AnyEngine, model: HybridForCausalLM) -> float:
    """Bytes of a weight of `model` as an engine's decode passes read it, on average."""
    products = getattr(getattr(engine, "ops", None), "products", None)
    if products is not None and products.bfloat16:
        return 2
    return mean_bytes(model)


def _several_devices(*models: Draft) -> str | None:
    """Reason that one graph cannot hold the steps of models, where some are on several devices."""
    for model in models:
        if isinstance(model, HybridForCausalLM) and len(devices := devices_of(model)) > 1:
            return f"they need one device, a model is on {len(devices)}"
    return None


@cache
def _say_once(message: str) -> None:
    console.warn(message)


def _drafter(draft: Draft, target: HybridForCausalLM) -> Drafter | None:
    if draft is None:
        return None
    if isinstance(draft, str):
        return NgramDrafter()
    if isinstance(draft, DraftHead):
        return HeadDrafter(draft)
    return ModelDrafter(draft, target.config.vocab_size)
