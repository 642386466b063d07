"""Every new mixer learns to answer like the attention it replaces, from the teacher's own input.

Teacher-forced: layer i's mixer gets the hidden state that entered the teacher's attention (after
the input norm) and must give what left its o_proj. Layers do not see each other, so one teacher
pass trains all of them, and each layer's graph is gone before the next one starts. Nothing in a
pass waits for the device.
"""

import torch
from torch import Tensor, nn

from mambactl.data.pack import Batch
from mambactl.models.distance import misfit, relative_error
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.models.mixers.context import StepContext
from mambactl.train.compiled import compiled
from mambactl.train.objectives import autocast


class AlignmentObjective:
    """Mean over layers of the masked squared error divided by that layer's teacher variance.

    A loss of 1 is what a mixer that only outputs the mean would get. Raises ValueError when the
    teacher has no attention in a replaced layer, or another number of layers or width.
    """

    def __init__(
        self,
        student: HybridForCausalLM,
        teacher: HybridForCausalLM,
        amp: torch.dtype | None = None,
        compile: bool = False,
    ):
        problem = misfit(student.config, teacher.config)
        if problem:
            raise ValueError(problem)
        self.student, self.teacher, self.amp = student, teacher, amp
        self.layers = student.config.replaced_layers
        self.mixers = {index: student.model.layers[index].mixer for index in self.layers}
        self._error = compiled(mixer_error) if compile else mixer_error

    def count(self, batch: Batch) -> int:
        """Tokens that are not padding."""
        return int(batch.valid.sum())

    def inputs(self, batch: Batch, device: torch.device) -> Batch:
        """The batch."""
        return batch.to(device)

    def backward(self, batch: Batch, tokens: int | Tensor) -> Tensor:
        """One teacher pass as far as the last mixer; gradients are made on the way."""
        model, shares = self.teacher.model, []
        kind = batch.input_ids.device.type
        # where rows are one document each, positions say nothing that a mask would need
        positions = None if batch.seq_idx is None else batch.position_ids
        with torch.no_grad(), autocast(batch.input_ids.device, self.amp):
            hidden, context = model.enter(batch.input_ids, positions, batch.seq_idx)
            context = self.student.model.with_windows(context)
            for index, block in enumerate(model.layers[: self.layers[-1] + 1]):
                if index not in self.mixers:
                    hidden = block(hidden, context, None)
                    continue
                hidden, entered, wanted = block.observe(hidden, context)
                with torch.enable_grad():
                    error = self._error(self.mixers[index], entered, context, wanted, batch.valid)
                    share = error / (tokens * len(self.mixers))
                # a backward pass must not run under autocast
                with torch.autocast(kind, enabled=False):
                    share.backward()
                shares.append(share.detach())
        return torch.stack(shares).sum()


def mixer_error(
    mixer: nn.Module, hidden: Tensor, context: StepContext, wanted: Tensor, valid: Tensor
) -> Tensor:
    """`relative_error` of a mixer's output for hidden [B, T, D]."""
    return relative_error(mixer(hidden, context, None), wanted, valid)
