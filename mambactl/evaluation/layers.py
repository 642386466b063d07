"""Error of each new mixer's output relative to that of the attention it replaces."""

from collections.abc import Iterable, Sequence
from functools import partial

import torch

from mambactl import console
from mambactl.data.encoding import TokenIds
from mambactl.errors import UsageError
from mambactl.evaluation.fidelity import cut_rows, tokens_of
from mambactl.generation.dealer import ALONE, Dealer
from mambactl.kernels.divergence import relative_error
from mambactl.models.block import HybridBlock
from mambactl.models.config import HybridConfig
from mambactl.models.hybrid import HybridForCausalLM


@torch.inference_mode()
def layer_errors(
    student: HybridForCausalLM,
    teacher: HybridForCausalLM,
    documents: Iterable[TokenIds],
    max_length: int = 512,
    batch_size: int = 4,
    dealer: Dealer = ALONE,
) -> dict[int, float]:
    """Relative error of every replaced layer, teacher-forced: what the `align` phase minimises.

    A mixer gets what entered the teacher's attention (after the input norm); the error is the mean
    squared difference to what left it over that output's variance. 1 is what a mixer gets that
    only puts out the mean. Raises UsageError where layers do not correspond or none is replaced.
    """
    require_layers(student.config, teacher.config)
    layers = student.config.replaced_layers
    blocks = {index: student.model.layers[index] for index in layers}
    rows = cut_rows(documents, max_length)
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    with console.progress("layers", tokens_of(rows)) as task:
        # they stay on the device: a number that is read makes the host wait
        found = dealer.results(
            batches, partial(_batch_errors, blocks, teacher), task.advance, tokens_of
        )
    zero = torch.zeros((), dtype=torch.float64)
    totals = {index: sum((each[index].double() for each in found), zero) for index in layers}
    return {index: float(total / tokens_of(rows)) for index, total in totals.items()}


def require_layers(student: HybridConfig, teacher: HybridConfig) -> None:
    """Raise UsageError unless the student has mixers in place of the teacher's attention."""
    problem = student.misfit(teacher)
    if problem is None and not student.replaced_layers:
        problem = "the model has no Mamba layer"
    if problem is not None:
        raise UsageError(
            f"layers cannot be compared: {problem}", "--teacher names the model it was made from"
        )


def _batch_errors(
    blocks: dict[int, HybridBlock], teacher: HybridForCausalLM, rows: Sequence[torch.Tensor]
) -> dict[int, torch.Tensor]:
    """Summed errors by layer; padding stands on the right, where no valid token sees it."""
    model, device = teacher.model, teacher.device
    ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True).to(device)  # [B, T]
    lengths = torch.tensor([len(row) for row in rows], device=device)
    valid = torch.arange(ids.shape[1], device=device) < lengths[:, None]  # [B, T]
    hidden, context = model.enter(ids)
    found = {}
    for index, block in enumerate(model.layers[: max(blocks) + 1]):
        hidden, entered, wanted = block.observe(hidden, context)
        if index in blocks:
            # layers of the two models may lie on other devices
            got = blocks[index].mixer_output(entered, context).to(device)
            found[index] = relative_error(got, wanted.to(device), valid)
    return found
