"""The device side of a running batch: control block, token buffers and mailbox."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mambactl.decode.sampler import SamplingParams
from mambactl.kernels.decode.reference.control import Field, Letter, plan_stores
from mambactl.kernels.random import as_int64

# mailbox slots; the host may be this many steps behind
DEPTH = 8
MOST_EOS = 64


class Batch:
    """Buffers for `size` sequences of up to `capacity` tokens and at most `k` drafts a step.

    The step's kernels read and write these; the host fills them at the start and then only reads
    `pinned`, the mailbox's copy.
    """

    def __init__(self, size: int, capacity: int, k: int, device: torch.device):
        def integers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self.size, self.capacity, self.k = size, capacity, k
        self.control = integers(len(Field), size)
        self.feed = integers(size, 2 + k)
        self.history = integers(size, capacity)
        self.best = integers(size * (k + 1))
        self.accepted, self.following, self.drafted = integers(size), integers(size), integers(size)
        self.present = integers(size)
        self.eos = torch.full((MOST_EOS,), -1, dtype=torch.int32, device=device)
        self.mailbox = integers(DEPTH, size, len(Letter) + k + 1)
        self.pinned = torch.zeros(
            self.mailbox.shape, dtype=torch.int32, pin_memory=device.type == "cuda"
        )
        self.keys = torch.zeros(size, dtype=torch.long, device=device)
        self.seed = torch.zeros(1, dtype=torch.long, device=device)
        self.settings = torch.zeros(3, device=device)

    def field(self, field: Field) -> Tensor:
        """One row [B] of the control block."""
        return self.control[field]

    def start(
        self,
        prompts: Sequence[Sequence[int]],
        keys: Sequence[int],
        params: SamplingParams,
        *,
        span: int,
        limit: int,
        draft_limit: int,
    ) -> None:
        """Begin with whole prompts, of which the models hold all but the last one (two) tokens."""
        rows = len(prompts)
        control = torch.zeros(len(Field), self.size, dtype=torch.int32)
        history = torch.zeros(self.size, self.capacity, dtype=torch.int32)
        feed = torch.zeros(self.size, self.feed.shape[1], dtype=torch.int32)
        for row, prompt in enumerate(prompts):
            history[row, : len(prompt)] = torch.tensor(prompt, dtype=torch.int32)
            feed[row, 0], feed[row, 1] = prompt[max(len(prompt) - 2, 0)], prompt[-1]
            control[Field.LENGTH, row] = control[Field.BASE, row] = len(prompt) - 1
            control[Field.DRAFT_BASE, row] = max(len(prompt) - 2, 0)
        control[Field.ACTIVE, :rows] = 1
        control[Field.BUDGET, :rows] = params.max_new_tokens
        plan_stores(control, span=span, limit=limit, draft_limit=draft_limit)
        self.control.copy_(control)
        self.history.copy_(history)
        self.feed.copy_(feed)
        eos = torch.full((MOST_EOS,), -1, dtype=torch.int32)
        eos[: len(params.eos_token_ids)] = torch.tensor(params.eos_token_ids, dtype=torch.int32)
        self.eos.copy_(eos)
        names = torch.zeros(self.size, dtype=torch.long)
        names[:rows] = torch.tensor(list(keys), dtype=torch.long)
        self.keys.copy_(names)
        self.seed.fill_(as_int64(params.seed))
        self.settings.copy_(torch.tensor([params.temperature, params.top_k, params.top_p]))
