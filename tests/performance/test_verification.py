"""The passes that are timed: where they stand, and that they are whole."""

import pytest
import torch

from mambactl.decode.gpu.state import pack
from mambactl.errors import ResourceError
from mambactl.kernels.decode.reference.ops import ReferenceOps
from mambactl.kernels.decode.reference.verdict import Field
from mambactl.speed.subject import Grid
from tests.performance.verification import NUMBERS, read, require_kernels, stand, verify

CONTEXT = 20


@pytest.mark.parametrize("name", ["tiny-hybrid", "tiny-mamba", "tiny-mamba2", "tiny-window"])
@pytest.mark.parametrize(("k", "replayed"), [(3, 3), (0, 0)])
def test_a_pass_reads_its_window_behind_the_replay(scripted, name, k, replayed):
    subject, _ = scripted(name)
    weights = pack(subject.model, 32)
    session = stand(weights, ReferenceOps(), 2, 32, CONTEXT, k, replayed)
    batch = session.batch
    assert batch.field(Field.LENGTH).tolist() == [CONTEXT] * 2
    assert batch.field(Field.BASE).tolist() == [CONTEXT - replayed] * 2
    # plain decoding stores the state after its token, a verification the one before its window
    assert batch.field(Field.NEXT).tolist() == [CONTEXT + (k == 0)] * 2
    batch.best.fill_(-1)
    with torch.no_grad():
        read(session)
    # a script answers with the successor of every token of the window
    expected = subject.successor[batch.feed[:, 1 : 2 + k].long()]
    assert torch.equal(batch.best.view(2, k + 1).long(), expected)


def test_a_machine_without_a_gpu_says_what_is_missing():
    with pytest.raises(ResourceError, match="needs the GPU's .*: needs a CUDA device"):
        require_kernels(torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_ratio_of_both_passes():
    from mambactl.speed.shapes import build
    from mambactl.speed.subject import Subject

    subject = Subject(build("mamba2-130m", "cuda", torch.bfloat16), "m", 1e12)
    (point,) = verify(subject, 4, Grid([64], [1], 8), [{"input_len": 64}])
    assert point["verify_ratio"] == point["verify_seconds"] / point["pass_seconds"]
    assert 0.8 < point["verify_ratio"] < 5 and set(NUMBERS) < set(point)
