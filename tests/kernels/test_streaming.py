"""The kernel that only reads: it reads what it says, and all of it counts."""

import pytest
import torch

pytest.importorskip("triton")
streaming = pytest.importorskip("mambactl.kernels.streaming")


@pytest.mark.parametrize(("programs", "numbers"), [(3, 3 * 2 * 2 * 64), (2, 2 * 3 * 2 * 64 + 100)])
def test_every_program_sums_its_stretch(device, programs: int, numbers: int) -> None:
    source = torch.randint(9, (numbers,), device=device).float()
    sums = torch.full((programs,), -1.0, device=device)
    count = streaming.read(source, sums, block=64, warps=2, ahead=2)
    assert numbers - programs * 2 * 64 < count <= numbers
    torch.testing.assert_close(sums, source[:count].view(programs, -1).sum(1))
