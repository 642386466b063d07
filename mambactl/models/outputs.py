"""Arguments and outputs of a pass of the model, in the words of transformers."""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from mambactl.models.transformers_names import CACHE
from mambactl.present import present

# ends of documents in a packed row, and inputs that repeat what others say already
ENDS = {"cu_seq_lens_q", "cu_seq_lens_k"}
REPEATED = ENDS | {"cache_position", "max_length_q", "max_length_k"}


def refuse_unknown(given: Mapping[str, object], packed: bool) -> None:
    """Raise TypeError for inputs that would change nothing; `packed` says documents are known.

    generate() hands on what is no input, too: a tokenizer, say.
    """
    for name, value in given.items():
        if name in ENDS and value is not None and not packed:
            raise TypeError(f"{name} tells documents apart only beside their position_ids")
        unknown = isinstance(value, Tensor) and name not in REPEATED
        if unknown or (name == "is_causal" and value is False):
            raise TypeError(f"a hybrid model takes no {name}")


def chosen(
    every: Sequence[Tensor], which: bool | int | Sequence[int] | None
) -> tuple[Tensor, ...] | None:
    """Hidden states that are asked for: all, or some indices with None in place of the others."""
    if which is None or which is False:
        return None
    count = len(every)
    asked = range(count) if which is True else [which] if isinstance(which, int) else which
    found = {index % count for index in asked if -count <= index < count}
    states = tuple(t if index in found else None for index, t in enumerate(every))
    # transformers types its outputs without the gaps that it leaves itself
    return cast(tuple[Tensor, ...], states)


def joined(
    first: BaseModelOutputWithPast, second: BaseModelOutputWithPast
) -> BaseModelOutputWithPast:
    """Output that one pass over two adjacent runs of tokens would have returned."""
    hidden_states, attentions = second.hidden_states, second.attentions
    if hidden_states is not None:
        pairs = zip(present(first.hidden_states), hidden_states, strict=True)
        hidden_states = tuple(b if b is None else torch.cat([a, b], 1) for a, b in pairs)
    if attentions is not None:
        # no query sees the tokens behind it
        pairs = zip(present(first.attentions), attentions, strict=True)
        attentions = tuple(
            torch.cat([F.pad(a, (0, b.shape[3] - a.shape[3])), b], 2) for a, b in pairs
        )
    return BaseModelOutputWithPast(
        last_hidden_state=torch.cat([present(one.last_hidden_state) for one in (first, second)], 1),
        hidden_states=hidden_states,
        attentions=attentions,
        **{CACHE: getattr(second, CACHE)},
    )
