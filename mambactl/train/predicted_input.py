"""The product that begins a draft head: what its layer reads in the target, predicted.

The layer comes out of the target, where it read the stream of the layers below it. A head has none
of them, but the target's last stream behind the token before, and the token. Its product begins as
the linear map of both that comes closest, by least squares over some text, to what the layer had to
read for the target's stream to come out.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from mambactl.data.pack import Batch
from mambactl.models.draft_head import shifted
from mambactl.models.hybrid import HybridForCausalLM

# tokens that the map is fitted to, and of one pass of the target
TOKENS, ROWS = 1 << 17, 8
# what is added to the diagonal of the squares, as a share of its mean
RIDGE = 1e-2


@torch.no_grad()
def input_map(target: HybridForCausalLM, layer: int | None, text: Iterable[Batch]) -> Tensor:
    """Weight [D, 2 D] fp32 of the map from the stream before and the embedding to a head's stream.

    Both come at an rms of 1. The map gives the target's last stream, without what `layer` of it
    adds: of the last layer that is its input. Streams count by their direction: a token whose
    stream is large weighs as much as any other. The first token of a document is left out.
    """
    width = target.config.hidden_size
    squares = torch.zeros(2 * width, 2 * width, device=target.device)
    products = torch.zeros(2 * width, width, device=target.device)
    seen = 0
    for batch in text:
        for part in _parts(batch):
            given, wanted = _pairs(target, layer, part.to(target.device))
            squares.addmm_(given.t(), given)
            products.addmm_(given.t(), wanted)
            seen += len(given)
        if seen >= TOKENS:
            break
    diagonal = squares.diagonal()
    diagonal += RIDGE * diagonal.mean().clamp(min=torch.finfo(torch.float32).tiny)
    return torch.linalg.solve(squares.double(), products.double()).float().t()


def _parts(batch: Batch) -> Iterable[Batch]:
    """The rows of a batch, a few at a time."""
    for start in range(0, len(batch.input_ids), ROWS):
        yield batch.each(lambda tensor, start=start: tensor[start : start + ROWS])


def _pairs(target: HybridForCausalLM, layer: int | None, batch: Batch) -> tuple[Tensor, Tensor]:
    """Inputs [N, 2 D] and what they should give [N, D], over the size of the latter."""
    model = target.model
    positions = None if batch.seq_idx is None else batch.position_ids
    stream, context = model.enter(batch.input_ids, positions, batch.seq_idx)
    added = torch.zeros_like(stream)
    for number, block in enumerate(model.layers):
        read, stream = stream, block(stream, context, None)
        if number == layer:
            added = stream - read
    before = shifted(stream, torch.zeros_like(stream[:, 0]))
    own = batch.valid & (batch.position_ids > 0)
    wanted = (stream - added)[own].float()
    size = _size(wanted)
    embedded = model.embed_tokens(batch.input_ids)
    given = torch.cat([part[own].float() / _size(part[own]) for part in (before, embedded)], -1)
    return given / size, wanted / size


def _size(stream: Tensor) -> Tensor:
    """The rms [N, 1] of streams [N, D]."""
    return stream.float().square().mean(-1, keepdim=True).sqrt().clamp(min=1e-6)
