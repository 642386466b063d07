"""A conversation in a file: its messages, the tokens that were read, and what the model held.

The file is safetensors: `ids` [L] and the tensors of a cache that has read them. Its header names
the model by the digest of its weights, and has a digest of all else that is in the file. What it
holds was read up to the last answer, which is read again; a draft reads all of it.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from mambactl.bounds import ROW_TOKENS
from mambactl.checkpoint.provenance import header_digest
from mambactl.checkpoint.resolve import resolve
from mambactl.checkpoint.safetensors_reader import open_safetensors
from mambactl.decode.conversation import Point
from mambactl.decode.prefill import read_in_pieces
from mambactl.errors import ModelError, OutputError, UsageError
from mambactl.files import explained, replacing
from mambactl.foreign import blamed, json_value
from mambactl.generation.dialogue import Chat, Message
from mambactl.models.cache import AttentionCache, HybridCache
from mambactl.models.draft_head import DraftHead
from mambactl.models.key_ring import KeyRing

FORMAT = "mambactl conversation 1"
IDS = "ids"
_HINT = "give a file that /save wrote"


def save(chat: Chat, name: str) -> None:
    """Write a conversation into a new file, or in the place of one that was saved before.

    Raises UsageError where nothing was said and where no state is kept, OutputError for a file of
    another kind and for one that cannot be written, ResourceError on a full disk.
    """
    if isinstance(chat.setup.draft, DraftHead):
        raise UsageError(
            "beside a draft head no state is kept between messages", "chat without it to save"
        )
    points = chat.conversation.points
    point = next((each for each in reversed(points) if not each.answered), None)
    if point is None:
        raise UsageError("nothing was said yet", "say something first")
    path = Path(name).expanduser()
    if os.path.lexists(path) and not _is_saved(path):
        raise OutputError(f"{path} is there and is no saved conversation", "give another name")
    tensors = {IDS: torch.tensor(point.tokens, dtype=torch.int32)}
    tensors |= {each: t.cpu().contiguous() for each, t in _tensors(point.cache).items()}
    messages = json.dumps(chat.messages)
    header = {"format": FORMAT, "model": _digest_of(chat), "messages": messages}
    header["content"] = _content(tensors, messages)
    with explained(path, "free some space", "give another name"), replacing(path) as new:
        save_file(tensors, new, header)


def load(chat: Chat, name: str) -> None:
    """Go on with a saved conversation in the place of the present one.

    Raises ModelError for a file that is missing, damaged or of another model, and leaves the
    conversation as it was.
    """
    path = Path(name).expanduser()
    if not os.path.isfile(path):
        raise ModelError(f"{path} is no file", _HINT)
    cache = _blank(chat)
    with open_safetensors(path, "pt") as file, blamed(path, hint=_HINT):
        header = file.metadata() or {}
        if header.get("format") != FORMAT:
            raise ValueError("it is no saved conversation")
        if header.get("model") != _digest_of(chat):
            raise ModelError(f"{path} is a conversation with another model", f"not {chat.source}")
        messages = _messages(json_value(header["messages"]))
        shapes = {each: file.get_slice(each).get_shape() for each in file.keys()}  # noqa: SIM118
        length = _length(shapes)
        if shapes != {IDS: [length]} | _shapes(cache, length, shapes):
            raise ValueError("its tensors are not those of this model's cache")
        tensors = {each: file.get_tensor(each).clone() for each in shapes}
        if _content(tensors, header["messages"]) != header.get("content"):
            raise ValueError("its content is not what was written")
        ids = tensors.pop(IDS).tolist()
        _fill(cache, tensors, length)
    chat.messages = messages
    chat.conversation.clear()
    chat.conversation.points.append(Point(ids, cache))


def _is_saved(path: Path) -> bool:
    try:
        with open_safetensors(path) as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except ModelError:
        return False


def _digest_of(chat: Chat) -> str:
    return header_digest(resolve(chat.source).path)


def _content(tensors: Mapping[str, Tensor], messages: str) -> str:
    digest = hashlib.sha256(messages.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _messages(value: object) -> list[Message]:
    if not isinstance(value, list):
        raise ValueError("its messages are no list")
    for each in value:
        if not isinstance(each, dict) or each.keys() != {"role", "content"}:
            raise ValueError("a message is more or less than a role and a content")
        if not all(isinstance(part, str) for part in each.values()):
            raise ValueError("a message is no text")
    return value


def _length(shapes: Mapping[str, list[int]]) -> int:
    (length,) = shapes[IDS]
    if not 1 <= length <= ROW_TOKENS.most:
        raise ValueError(f"{length} tokens are not from 1 to {ROW_TOKENS.most}")
    return length


def _keeps_all(cache: HybridCache) -> dict[str, bool]:
    """Map the name of each tensor to True if it has a slot for every token."""
    found = {}
    for index, layer in enumerate(cache.layers):
        whole = layer if isinstance(layer, AttentionCache) else getattr(layer, "kept", None)
        every = set() if whole is None else {id(tensor) for tensor in whole.tensors()}
        for number, tensor in enumerate(layer.tensors()):
            found[f"{index}.{number}"] = id(tensor) in every
    return found


def _named(cache: HybridCache) -> dict[str, Tensor]:
    return {
        f"{index}.{number}": tensor
        for index, layer in enumerate(cache.layers)
        for number, tensor in enumerate(layer.tensors())
    }


def _tensors(cache: HybridCache) -> dict[str, Tensor]:
    """Every tensor of a cache of one row; those with a slot for every token without empty ones."""
    keeps = _keeps_all(cache)
    return {
        name: tensor[:, :, : cache.seen] if keeps[name] else tensor
        for name, tensor in _named(cache).items()
    }


def _shapes(
    cache: HybridCache, length: int, saved: Mapping[str, list[int]]
) -> dict[str, list[int]]:
    """Shapes of `_tensors` after `length` tokens, with rings of the size that was `saved`.

    A ring has room for drafts that may be taken back; one that was never needed has none.
    """
    keeps, rings, found = _keeps_all(cache), _rings(cache), {}
    for name, tensor in _named(cache).items():
        shape = list(tensor.shape)
        if keeps[name]:
            shape[2] = length
        elif name in rings and len(saved.get(name, ())) == len(shape):
            shape[2] = max(shape[2], saved[name][2])
        found[name] = shape
    return found


def _rings(cache: HybridCache) -> set[str]:
    """The names of keys and values of windows."""
    held = {
        id(tensor)
        for layer in cache.layers
        if isinstance(layer, KeyRing)
        for tensor in (layer.keys, layer.values)
    }
    return {name for name, tensor in _named(cache).items() if id(tensor) in held}


def _blank(chat: Chat) -> HybridCache:
    """A cache of the kind that the conversation has, for its shapes."""
    model = chat.conversation.model
    cache = HybridCache(model.config, 1, model.device)
    with torch.no_grad():
        read_in_pieces(model, cache, [[0, 0]])
    return cache


def _fill(cache: HybridCache, tensors: Mapping[str, Tensor], length: int) -> None:
    """Put what was saved after `length` tokens in the place of what the cache holds."""
    own = _named(cache)
    for name, tensor in tensors.items():
        if tensor.dtype != own[name].dtype:
            raise ValueError(
                f"it was saved in {tensor.dtype}, the model works in {own[name].dtype}"
            )
    found = {id(each): tensors[name].to(each.device) for name, each in own.items()}
    for layer in cache.layers:
        layer.replace_tensors(lambda tensor: found[id(tensor)])
    cache.advance(length - cache.seen, length - cache.seen, permanent=True)
