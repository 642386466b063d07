"""The hybrid decoder as a transformers model: Llama blocks whose mixer differs by layer.

Tensor names of attention layers, MLPs, norms and embeddings are Llama's, so a Llama checkpoint is
a hybrid with no Mamba layer. Any padding is turned into ragged rows (`n_new`) at the entrance.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.auto import modeling_auto
from transformers.utils.generic import can_return_tuple

from mambactl.kernels import dispatch
from mambactl.kernels.local_attention import LocalKeys, LocalSpan, local_keys
from mambactl.kernels.reference import Spans, spans
from mambactl.models.block import FinalRMSNorm, HybridBlock
from mambactl.models.cache import HybridCache
from mambactl.models.config import HybridConfig
from mambactl.models.generating import HybridGenerationMixin, require_own
from mambactl.models.mixers.spec import StepContext, goes_sequentially
from mambactl.models.outputs import chosen, joined, refuse_unknown
from mambactl.models.positions import RotaryEmbedding
from mambactl.models.pretrained import HybridPreTrainedModel
from mambactl.models.ragged import AttentionMaps, Ragged, documents, without_padding
from mambactl.models.transformers_names import CACHE, one_cache
from mambactl.registration import add_names

__all__ = ["HybridConfig", "HybridForCausalLM", "HybridModel"]

# arguments of the loss alone
LOSS_ARGUMENTS = {"num_items_in_batch", "shift_labels", "ignore_index"}


@dataclass(frozen=True)
class _Sight:
    """Sight of `mixers`: whether any heads see all of the past, and the spans of their windows."""

    mixers: list[str]
    all: bool
    spans: list[LocalSpan]


if TYPE_CHECKING:

    class Blocks(nn.ModuleList):
        """Blocks of a model, in order."""

        def __iter__(self) -> Iterator[HybridBlock]: ...

        @overload
        def __getitem__(self, idx: slice) -> "Blocks": ...

        @overload
        def __getitem__(self, idx: int) -> HybridBlock: ...

        def __getitem__(self, idx: int | slice) -> "HybridBlock | Blocks": ...

else:
    Blocks = nn.ModuleList


class HybridModel(HybridPreTrainedModel):
    """Embeddings, blocks and the final norm."""

    def __init__(self, config: HybridConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = Blocks(
            HybridBlock(config, index) for index in range(config.num_hidden_layers)
        )
        # the last states are those that the head multiplies
        self.norm = FinalRMSNorm(config.hidden_size, config.rms_norm_eps, 1 / config.logits_scaling)
        self.rotary_emb = RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self._sight: _Sight | None = None
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HybridCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        seq_idx: Tensor | None = None,
        n_new: Tensor | None = None,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        output_attentions: bool | None = None,
        cache: HybridCache | None = None,
        **others: object,
    ) -> BaseModelOutputWithPast:
        """input_ids [B, T] -> hidden states [B, T, D] after the final norm.

        attention_mask [B, T] or [B, past + T] marks padding with 0; `n_new` and `seq_idx` are
        explained in `mambactl.kernels.reference`. Attention weights [B, H, T, past + T] are those
        of layers that are attention alone. `cache` is the name that `past_key_values` has from
        transformers 5.24 on. TypeError for inputs that mean nothing here, ValueError for a cache of
        another model.
        """
        cache = one_cache(past_key_values, cache)
        refuse_unknown(others, packed=position_ids is not None or seq_idx is not None)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("HybridModel takes input_ids or inputs_embeds, one of them")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        given = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        hidden = self._entered(given)
        length, newest = hidden.shape[1], getattr(cache, "revocable", 0)
        outputs = output_hidden_states, output_attentions
        if cache is None or not newest or length == 1 or cache.seen:
            masks = attention_mask, position_ids, seq_idx, n_new
            return self._read(hidden, *masks, cache, use_cache, *outputs)
        # tokens that may be taken back go one by one
        start = max(length - newest, 1)
        parts = (
            self._read(
                hidden[:, a:b],
                None if attention_mask is None else attention_mask[:, :b],
                None if position_ids is None else position_ids[:, a:b],
                None,
                None,
                cache,
                use_cache,
                *outputs,
            )
            for a, b in ((0, start), (start, length))
        )
        return joined(*parts)

    def _read(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        seq_idx: Tensor | None,
        n_new: Tensor | None,
        given: HybridCache | None,
        use_cache: bool | None,
        output_hidden_states: bool | int | Sequence[int] | None,
        output_attentions: bool | None,
    ) -> BaseModelOutputWithPast:
        """One pass of the layers over hidden [B, T, D]."""
        batch, length = hidden.shape[:2]
        rows = without_padding(attention_mask, n_new, length)
        every = [hidden]
        hidden, n_new = rows.sort(hidden), rows.n_new
        position_ids, seq_idx = (
            None if t is None else rows.sort(t.expand(batch, length))
            for t in (position_ids, seq_idx)
        )
        if seq_idx is None and position_ids is not None:
            seq_idx = documents(position_ids, n_new)
        cache = self._cache(given, use_cache, hidden, seq_idx is not None)
        context = self.context(hidden, position_ids, cache, seq_idx, n_new)
        maps = self._maps(rows, attention_mask, length, cache) if output_attentions else None
        mapped = context if maps is None else replace(context, maps=maps)
        for layer in self.layers:
            hidden = layer(hidden, mapped if layer.is_attention else context, cache)
            if output_hidden_states not in (None, False):
                # gradients of what is returned pass through it
                every.append(rows.restore(hidden))
                hidden = rows.sort(every[-1])
        if cache is not None:
            _advance(cache, context)
        every[-1] = hidden = rows.restore(self.norm(hidden))
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            hidden_states=chosen(every, output_hidden_states),
            attentions=None if maps is None else tuple(maps.found),
            **{CACHE: cache},
        )

    def _maps(
        self,
        rows: Ragged,
        attention_mask: Tensor | None,
        length: int,
        cache: HybridCache | None,
    ) -> AttentionMaps:
        """Store of the layers' attention weights; ValueError in a model without attention."""
        if not self.config.attention_layers:
            raise ValueError(f"output_attentions: no layer of {self.config.mixers} is attention")
        before = 0 if cache is None else cache.seen
        padded = cache is not None and bool((cache.lengths != before).any())
        return AttentionMaps(rows, attention_mask, before + length, padded)

    def embedded(self, input_ids: Tensor) -> Tensor:
        """The stream [B, T, D] in front of the first block."""
        return self._entered(self.embed_tokens(input_ids))

    def _entered(self, embeddings: Tensor) -> Tensor:
        factor = self.config.embedding_multiplier
        return _stream(embeddings if factor == 1 else embeddings * factor)

    def enter(
        self, input_ids: Tensor, position_ids: Tensor | None = None, seq_idx: Tensor | None = None
    ) -> tuple[Tensor, StepContext]:
        """Input and context of the first block, for rows [B, T] without padding or a cache."""
        hidden = self.embedded(input_ids)
        return hidden, self.context(hidden, position_ids, seq_idx=seq_idx)

    def read(self, input_ids: Tensor, cache: HybridCache, n_new: Tensor | None) -> Tensor:
        """The stream [B, T, D] behind the last block for all or the first n_new [B] of T tokens.

        Asks the device for nothing where `cache.level`, so that a CUDA graph can hold it.
        """
        return self.read_on(self.embedded(input_ids), cache, n_new)

    def read_on(self, hidden: Tensor, cache: HybridCache, n_new: Tensor | None) -> Tensor:
        """The stream behind the last block for the stream [B, T, D] in front of the first."""
        context = self.context(hidden, cache=cache, n_new=n_new)
        for layer in self.layers:
            hidden = layer(hidden, context, cache)
        _advance(cache, context)
        return hidden

    def _cache(
        self, given: HybridCache | None, use_cache: bool | None, hidden: Tensor, packed: bool
    ) -> HybridCache | None:
        """The cache this call fills; packed rows have none, as they have no one continuation."""
        if given is not None:
            require_own(given)
            if packed:
                raise ValueError("packed rows (seq_idx, restarting position_ids) take no cache")
            return given
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if not use_cache or packed:
            return None
        return HybridCache(self.config, hidden.shape[0], hidden.device)

    def context(
        self,
        hidden: Tensor,
        position_ids: Tensor | None = None,
        cache: HybridCache | None = None,
        seq_idx: Tensor | None = None,
        n_new: Tensor | None = None,
    ) -> StepContext:
        """Everything the mixers share in one call over hidden [B, T, D].

        With a cache the positions follow from its lengths.
        """
        batch, length = hidden.shape[:2]
        steps = torch.arange(length, device=hidden.device)
        start = cache.lengths[:, None] if cache is not None else 0
        positions = (start + steps).expand(batch, length)  # [B, T]
        if position_ids is not None and cache is None:
            positions = position_ids.expand(batch, length)
        slots = length
        level = cache is not None and cache.level
        if cache is not None and cache.seen:
            slots += cache.seen if level else int(cache.lengths.max())
        first = cache is not None and cache.seen == 0
        seen = None if cache is not None else self._spans(positions, seq_idx)
        fused = dispatch.triton_missing(hidden.device) is None
        mask = self._cached_mask(positions, slots, first or level) if cache is not None else None
        cursor = None if cache is None else cache.cursor(n_new)
        whole = cache is None or (first and not goes_sequentially(length, cursor, first))
        made = StepContext(
            positions=positions,
            rotary=self.rotary_emb(hidden, positions),
            # a mask is made once, not once per layer
            mask=mask if seen is None or fused else seen.mask(),
            spans=seen,
            seq_idx=None if seq_idx is None else seq_idx.int().contiguous(),
            n_new=n_new,
            slots=slots,
            cursor=cursor,
            first=first,
            level=level,
        )
        return replace(made, local=self._local(made, whole))

    def _local(self, context: StepContext, whole: bool) -> dict[LocalSpan, LocalKeys]:
        """Keys seen by windows beside recurrences: for whole rows [B, T], or for later pieces of
        rows with the keys before them in front.
        """
        batch, length = context.positions.shape
        device, found = context.positions.device, {}
        for span in self._seeing.spans:
            if whole or context.continues(span):
                columns = length if whole else span.before + length
                found[span] = local_keys(batch, columns, *span, context.seq_idx, device)
        return found

    @property
    def _seeing(self) -> "_Sight":
        """Current sight of the layers; stepwise training exchanges mixers of a running model."""
        if self._sight is None or self._sight.mixers is not self.config.mixers:
            config = self.config
            self._sight = _Sight(config.mixers, config.sees_all, config.local_spans)
        return self._sight

    def look(self, spans: Iterable[LocalSpan]) -> None:
        """Use these spans of windows from now on in place of those of the layers."""
        self._sight = replace(self._seeing, spans=list(spans))

    def with_windows(self, context: StepContext) -> StepContext:
        """Context of whole rows from another model, with the keys that these windows see."""
        return replace(context, local=self._local(context, whole=True))

    def _spans(self, positions: Tensor, seq_idx: Tensor | None) -> Spans | None:
        """Spans that tokens [B, T] see without a cache, None where that is all of the past."""
        window = self.config.sliding_window
        if not self._seeing.all:
            return None
        if seq_idx is None and not (window and window < positions.shape[1]):
            return None
        return spans(seq_idx, positions, window)

    def _cached_mask(self, positions: Tensor, slots: int, level: bool) -> Tensor | None:
        """Allowed keys [B, 1, T, S], or None where plain causal attention is the same."""
        window = self.config.sliding_window
        if not self._seeing.all or (level and not (window and window < slots)):
            return None
        query, key = positions[..., None], torch.arange(slots, device=positions.device)
        allowed = key <= query  # [B, T, S]
        if window:
            allowed = allowed & (key > query - window)
        return allowed[:, None]


def _advance(cache: HybridCache, context: StepContext) -> None:
    """Tell the cache that every layer has read the tokens of the context."""
    columns = context.positions.shape[1]
    permanent = not (cache.recording and context.sequential)
    cache.advance(columns if context.n_new is None else context.n_new, columns, permanent)


def _stream(hidden: Tensor) -> Tensor:
    """Hidden states in fp32 where autocast trains, though frozen embeddings are bf16.

    Of SmolLM2's gradients the worst tenth are off by 1.3 of their norm in a bf16 stream, and by
    0.3 in an fp32 one.
    """
    if hidden.dtype not in (torch.bfloat16, torch.float16) or not torch.is_grad_enabled():
        return hidden
    device = hidden.device.type
    # shapes without memory know no autocast
    mixed = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return hidden.float() if mixed else hidden


class HybridForCausalLM(HybridPreTrainedModel, HybridGenerationMixin):
    """The decoder with its language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: HybridConfig):
        super().__init__(config)
        self.model = HybridModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HybridCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: HybridCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """input_ids [B, T] -> logits [B, T, V] (last `logits_to_keep` tokens if not 0).

        `shift_labels` [B, T] are the next tokens themselves, of rows that are parts of longer ones.
        """
        loss_kwargs = {k: kwargs.pop(k) for k in LOSS_ARGUMENTS & kwargs.keys()}
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=one_cache(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None or loss_kwargs.get("shift_labels") is not None:
            loss = self.loss_function(logits, labels, self.vocab_size, **loss_kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: getattr(outputs, CACHE)},
        )


AutoConfig.register(HybridConfig.model_type, HybridConfig, exist_ok=True)
AutoModel.register(HybridConfig, HybridModel, exist_ok=True)
AutoModelForCausalLM.register(HybridConfig, HybridForCausalLM, exist_ok=True)
add_names()
# where pipelines and evaluations look up what a class can do
for names, kind in (
    (modeling_auto.MODEL_MAPPING_NAMES, HybridModel),
    (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, HybridForCausalLM),
):
    names.setdefault(HybridConfig.model_type, kind.__name__)
