"""One digest of everything but the tokens that decides the numbers in a state."""

import hashlib
import json
from collections.abc import Iterable
from functools import cache
from importlib import import_module
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from mambactl.kernels.dispatch import backends
from mambactl.models.hybrid import HybridModel

# fields of a configuration that say where it came from; types are those of the weights
_ORIGIN = ("_name_or_path", "transformers_version", "architectures", "auto_map", "dtype")
# folders of the package that compute a state
_CODE = ("kernels", "models", "decode")
# integers that one sum covers, and sums at once: a CPU's fit in its cache
_COLUMNS = 1 << 14
_ROWS = {"cpu": 1 << 4, "cuda": 1 << 12}
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int32}


def model_key(model: HybridModel) -> str:
    """sha256 of weights, form and types of a model, its device and the kernels that run there."""
    device = model.device
    config = {k: v for k, v in model.config.to_dict().items() if k not in _ORIGIN}
    live = [name for name, missing in backends(device).items() if missing is None]
    known = {
        "weights": fingerprint(chain(model.named_parameters(), model.named_buffers())),
        "form": config,
        "device": _device(device),
        "torch": [torch.__version__, torch.get_float32_matmul_precision()],
        "kernels": {name: _version(name) for name in live},
        "code": _code(),
    }
    text = json.dumps(known, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@torch.no_grad()
def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 of names, types, shapes and checksums of the bits of tensors, on their devices.

    A checksum is a sum of up to 16,384 integers times fixed odd numbers, modulo 2^64: one number
    that differs always changes it, and several do but for chance. It is no proof against forgery.
    """
    factors = torch.randint(
        -(2**62), 2**62, (_COLUMNS,), generator=torch.Generator().manual_seed(0)
    )
    on: dict[torch.device, Tensor] = {}
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        by = on.setdefault(tensor.device, factors.to(tensor.device))
        numbers = tensor.detach().contiguous().view(-1).view(_INTEGERS[tensor.element_size()])
        for part in numbers.split(_COLUMNS * _ROWS.get(tensor.device.type, 1)):
            digest.update(_sums(part, by).cpu().numpy().tobytes())
    return digest.hexdigest()


def _sums(numbers: Tensor, factors: Tensor) -> Tensor:
    """Sums [R] of integers [n] times factors [C], C integers each, fewer in the last."""
    whole = len(numbers) // _COLUMNS * _COLUMNS
    rows = numbers[:whole].view(-1, _COLUMNS)
    rest = numbers[whole:]
    sums = (rows.to(torch.int64) * factors).sum(1)
    return torch.cat([sums, (rest.to(torch.int64) * factors[: len(rest)]).sum()[None]])


def _version(name: str) -> str:
    return getattr(import_module(name.replace("-", "_")), "__version__", "")


def _device(device: torch.device) -> list[str | int]:
    if device.type == "cuda":
        return ["cuda", torch.cuda.get_device_name(device)]
    # sums are split among threads
    return [device.type, torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]


@cache
def _code() -> str:
    """sha256 of the modules whose change may change a state: their version may stay the same."""
    package = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(path for name in _CODE for path in (package / name).rglob("*.py")):
        digest.update(f"{path.relative_to(package)} ".encode() + path.read_bytes())
    return digest.hexdigest()
