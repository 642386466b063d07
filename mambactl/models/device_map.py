"""Device maps: a model over several devices, block by block, where one device is too small.

Embedding, final norm, head and the lengths of a cache stay on the first device, so that what a
model takes and gives is on `model.device` as ever. Blocks go to the devices in their order, each
with its part of a cache. The form of a map is Accelerate's (`hf_device_map`: a device for each
module), its hooks are not used: they wrap `forward` alone, and copy a context for every layer.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch

from mambactl.errors import ResourceError
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.models.mixers.sizes import FLOAT32_PARAMETERS
from mambactl.models.own_device import OwnDevice
from mambactl.options import DeviceMapConfig, StageConfig
from mambactl.units import decimal_size

_BLOCK = re.compile(r"model\.layers\.(\d+)\.")
# what is on the first device, as Accelerate names modules
_AROUND = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
# of a GPU's free memory; the rest is for activations and caches
_SHARE = 0.9
# steps in which the share of a device grows by a block, until all blocks fit
_STEPS = 8


@dataclass(frozen=True)
class Rooms:
    """Bytes that the weights of a model may take of each device, the first one in front.

    `balanced`: blocks go to all devices evenly, also where the first one has room for all.
    """

    room: Mapping[torch.device, int]
    balanced: bool = False

    @classmethod
    def of(cls, config: StageConfig) -> "Rooms | None":
        """The GPUs of this machine where `--device-map` asks for them; a CPU is one device."""
        if not isinstance(config, DeviceMapConfig) or config.device_map is None:
            return None
        if config.device == "cpu" or not torch.cuda.is_available():
            return None
        gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
        if config.max_memory is None:
            room = {gpu: int(_SHARE * torch.cuda.mem_get_info(gpu)[0]) for gpu in gpus}
        else:
            room = dict.fromkeys(gpus, int(config.max_memory * 1e9))
        return cls(room, config.device_map == "balanced")


class Sizes(NamedTuple):
    """Bytes of the weights of each block, and of everything around the blocks."""

    blocks: list[int]
    around: int

    @classmethod
    def of(cls, model: HybridForCausalLM, dtype: torch.dtype) -> "Sizes":
        """Sizes that a model, maybe without memory, has in `dtype`."""
        blocks, around = [0] * len(model.model.layers), 0
        for name, parameter in model.named_parameters():
            wide = name.rpartition(".")[2] in FLOAT32_PARAMETERS
            size = parameter.numel() * (torch.float32 if wide else dtype).itemsize
            if match := _BLOCK.match(name):
                blocks[int(match[1])] += size
            else:
                around += size
        return cls(blocks, around)

    @property
    def total(self) -> int:
        """Bytes of all weights."""
        return self.around + sum(self.blocks)


@dataclass(frozen=True)
class DeviceMap:
    """The device of each block, and the first device, which has everything else.

    Without blocks everything is there.
    """

    first: torch.device
    blocks: tuple[torch.device, ...] = ()

    @classmethod
    def of(cls, sizes: Sizes, rooms: Rooms) -> "DeviceMap":
        """A map that fits; ResourceError says how much is missing where there is none."""
        first, *_ = rooms.room
        if not rooms.balanced and sizes.total <= rooms.room[first]:
            return cls(first)
        found = _evenly(sizes, rooms.room) or _filled(sizes, rooms.room)
        if found is None:
            given = ", ".join(f"{decimal_size(n)} on {where}" for where, n in rooms.room.items())
            raise ResourceError(
                f"the model has {decimal_size(sizes.total)} of weights, of which embedding and "
                f"head ({decimal_size(sizes.around)}) go to {first}; there is room for {given}",
                "more or larger GPUs, or a higher --max-memory",
            )
        return cls(first, found)

    @property
    def devices(self) -> list[torch.device]:
        """The devices that hold weights, the first one in front."""
        return list(dict.fromkeys((self.first, *self.blocks)))

    def device_of(self, name: str) -> torch.device:
        """The device of the tensor called `name`."""
        match = _BLOCK.match(name) if self.blocks else None
        return self.first if match is None else self.blocks[int(match[1])]

    def settle(self, model: HybridForCausalLM) -> None:
        """Let blocks compute where their weights are, which `device_of` has placed already."""
        if len(self.devices) == 1:
            return
        model.model.rotary_emb.to(self.first)
        shared = {device: OwnDevice(device) for device in self.devices}
        for block, device in zip(model.model.layers, self.blocks, strict=True):
            block.own_device = shared[device]
        model.model.layers[-1].back = self.first
        named = {f"model.layers.{n}": device for n, device in enumerate(self.blocks)}
        # as libraries ask whether a model may be moved
        model.hf_device_map = dict.fromkeys(_AROUND, self.first) | named

    def describe(self) -> str:
        """The blocks of each device in words."""
        parts, start = [], 0
        for device, group in groupby(self.blocks):
            end = start + len(list(group))
            parts.append(f"{start} to {end - 1} on {device}")
            start = end
        return f"blocks {', '.join(parts)}; embedding and head on {self.first}"


def devices_of(model: HybridForCausalLM) -> list[torch.device]:
    """The devices that a model computes on; one, where no device map was asked for."""
    own = (block.own_device for block in model.model.layers)
    return list(dict.fromkeys([model.device, *(each.device for each in own if each)]))


def _evenly(sizes: Sizes, room: Mapping[torch.device, int]) -> tuple[torch.device, ...] | None:
    """As `_filled` where every device gets its share, and as little more as can be."""
    share, (first, *others) = sizes.total / len(room), room
    if others and sizes.around > share:
        share = sum(sizes.blocks) / len(others)
    for more in range(_STEPS + 1):
        most = int(share + max(sizes.blocks) * more / _STEPS)
        limits = {device: min(limit, most) for device, limit in room.items()}
        limits[first] = min(room[first], max(most, sizes.around))
        if found := _filled(sizes, limits):
            return found
    return None


def _filled(sizes: Sizes, limits: Mapping[torch.device, int]) -> tuple[torch.device, ...] | None:
    """A device for each block, in order, none filled beyond its limit; None if they are too few."""
    found: list[torch.device] = []
    waiting, taken = list(sizes.blocks), sizes.around
    for device, limit in limits.items():
        if taken > limit:
            return None
        while waiting and taken + waiting[0] <= limit:
            taken += waiting.pop(0)
            found.append(device)
        taken = 0
    return None if waiting else tuple(found)
