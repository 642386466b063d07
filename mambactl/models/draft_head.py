"""A draft of one decoder layer that reads the stream of the model it drafts for.

At position i it reads token x_i together with the target's stream behind x_(i-1), and predicts
x_(i+1). Further drafts read the head's own stream in place of the target's, which does not exist
yet. This is the form of EAGLE (arXiv 2401.15077) and of the multi-token prediction modules of
DeepSeek-V3 (arXiv 2412.19437, section 2.2): two norms, one product, one layer, one head. The layer
is attention: what it knows of a token lies at that token's slot, so that drafts which were rejected
are forgotten by lowering a length, and a stream that stood in for the target's is put right by
writing the slot again. A recurrence would have to be run again from a stored state for both.
"""

import torch
from torch import Tensor, nn

from mambactl.models.cache import HybridCache
from mambactl.models.config import HybridConfig
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.models.mixers.attention import RMSNorm
from mambactl.models.mixers.registry import ATTENTION


class DraftHead(nn.Module):
    """Norms of a stream and of an embedding, one product of both, one layer, a trimmed head.

    `body` is a model of one layer, whose `lm_head` [Vt, D] has a row for each of the target's
    tokens `ids` [Vt]; its embedding is the target's own.
    """

    ids: Tensor

    def __init__(self, body: HybridForCausalLM, ids: Tensor):
        super().__init__()
        config = body.config
        width, eps = config.hidden_size, config.rms_norm_eps
        self.stream_norm = RMSNorm(width, eps)
        self.token_norm = RMSNorm(width, eps)
        self.fc = nn.Linear(2 * width, width, bias=False)
        self.body = body
        self.register_buffer("ids", ids, persistent=False)

    @property
    def config(self) -> HybridConfig:
        """Configuration of the one layer, with the target's vocabulary."""
        return self.body.config

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.fc.weight.device

    def entering(self, streams: Tensor, tokens: Tensor) -> Tensor:
        """The layer's input [B, T, D] for tokens [B, T] and the streams [B, T, D] before them."""
        embedded = self.body.model.embed_tokens(tokens)
        return self.joined(streams, embedded)

    def joined(self, streams: Tensor, embedded: Tensor) -> Tensor:
        """One product of both inputs [..., D], each under a norm of its own."""
        parts = self.stream_norm(streams), self.token_norm(embedded)
        return self.fc(torch.cat(parts, -1))

    def read(
        self, streams: Tensor, tokens: Tensor, cache: HybridCache, n_new: Tensor | None
    ) -> Tensor:
        """Own stream [B, T, D] behind all or the first n_new [B] of T tokens [B, T]."""
        return self.body.model.read_on(self.entering(streams, tokens), cache, n_new)

    def logits(self, stream: Tensor) -> Tensor:
        """Logits [..., V] of the target's tokens; -inf for those that have no row."""
        own = self.body.lm_head(self.body.model.norm(stream))  # [..., Vt]
        whole = own.new_full((*own.shape[:-1], self.config.vocab_size), float("-inf"))
        return whole.index_copy_(-1, self.ids, own)


# a draft that has weights, or none
DraftModel = HybridForCausalLM | DraftHead | None


def layer_config(target: HybridConfig, index: int) -> HybridConfig:
    """Configuration of a head's layer: layer `index` of the target, as attention to all tokens."""
    whole = target.with_layers({index: (ATTENTION, None)})
    return whole.only(index, tie_word_embeddings=False, sliding_window=None)


def shifted(streams: Tensor, before: Tensor) -> Tensor:
    """Streams [B, T, D] moved on by one position, behind `before` [B, D]."""
    return torch.cat([before[:, None], streams[:, :-1]], 1)
