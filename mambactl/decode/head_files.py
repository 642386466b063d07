"""Draft heads on the disk: what is stored, and the target that one belongs to."""

from pathlib import Path

import torch
from torch import Tensor, nn

from mambactl import console
from mambactl.checkpoint.adapted import build_config, in_dtype, require_finite
from mambactl.checkpoint.container import OTHER_DISK, Container
from mambactl.checkpoint.head_layout import HEAD_CLASS, HEAD_TYPE, IDS, OUTPUT, head_fields, is_head
from mambactl.checkpoint.load import empty_model
from mambactl.checkpoint.opening import open_checkpoint
from mambactl.checkpoint.reader import Reader
from mambactl.decode.model_key import fingerprint
from mambactl.errors import ModelError
from mambactl.files import explained
from mambactl.json_values import AnyObject
from mambactl.models.config import HybridConfig
from mambactl.models.draft_head import DraftHead
from mambactl.models.hybrid import HybridForCausalLM

EMBEDDING = "body.model.embed_tokens.weight"


@torch.no_grad()
def weights_digest(model: HybridForCausalLM) -> str:
    """sha256 of a model's weights in bfloat16: the same in whichever type they were loaded."""
    return fingerprint((name, p.to(torch.bfloat16)) for name, p in model.named_parameters())


def new_head(target: HybridForCausalLM, config: HybridConfig, ids: Tensor) -> DraftHead:
    """A head on the target's device whose embedding is the target's, and its output the target's
    rows of `ids` [Vt]; all other weights are uninitialised.
    """
    with torch.device("meta"):
        head = DraftHead(empty_model(config), ids)
    head = head.to_empty(device=target.device).to(target.dtype)
    # neither is stored in a module's state: one is computed, the other given
    head.body.model.rotary_emb = empty_model(config).model.rotary_emb.to(target.device)
    head.ids = ids.to(target.device)
    table, rows = target.model.embed_tokens.weight, target.lm_head.weight.detach()
    # modules of its own: those of the target may become matrices in 8 bits
    head.body.model.embed_tokens = nn.Embedding(len(table), table.shape[1], device="meta")
    head.body.model.embed_tokens.weight = table
    head.body.lm_head = nn.Linear(rows.shape[1], len(ids), bias=False, device="meta")
    head.body.lm_head.weight = nn.Parameter(rows[head.ids], requires_grad=False)
    return head


def write_head(
    head: DraftHead,
    path: Path,
    single: bool,
    target: tuple[str, str],
    lineage: AnyObject,
    own_output: bool,
) -> None:
    """Write a head at `path`; `target` are name and digest of the model that it drafts for.

    With `own_output` the output's rows are stored, without they are the target's. Raises
    ResourceError on a full disk.
    """
    config = head.config.to_dict()
    for name in ("auto_map", "_name_or_path"):
        config.pop(name, None)
    config |= {"model_type": HEAD_TYPE, "architectures": [HEAD_CLASS]}
    config |= dict(zip(("target", "target_sha256"), target, strict=True))
    config["dtype"] = str(head.fc.weight.dtype).removeprefix("torch.")
    left_out = {EMBEDDING} | (set() if own_output else {OUTPUT})
    tensors = {k: v for k, v in head.state_dict().items() if k not in left_out}
    tensors[IDS] = head.ids
    file = Container(path, single, config, {}, lineage)
    with explained(path, OTHER_DISK):
        try:
            file.plan({name: (tuple(t.shape), t.dtype) for name, t in tensors.items()})
            for name, tensor in tensors.items():
                file.write(name, tensor)
            file.close()
        finally:
            file.release()


@console.doing("loading a draft head")
def load_head(spec: str, target: HybridForCausalLM, name: str) -> DraftHead:
    """The head at `spec` in the type and on the device of its target, which is called `name`.

    Raises ModelError where it was made for other weights, or is incomplete.
    """
    with open_checkpoint(spec) as reader:
        if not is_head(reader):
            raise ModelError(f"{reader.path} is no draft head", "make one: mambactl draft")
        require_target(reader, target, name)
        ids = _ids(reader, target.config.vocab_size)
        head = new_head(target, head_config(reader), ids)
        state = head.state_dict()
        expected = {k: tuple(t.shape) for k, t in state.items() if k != EMBEDDING}
        found = {k: reader.shape(k) for k in reader.names() if k != IDS}
        if OUTPUT not in found:
            found[OUTPUT] = expected[OUTPUT]
        wrong = sorted(k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k))
        if wrong:
            raise ModelError(
                f"{reader.path} does not fit its config: {', '.join(wrong[:5])}",
                "the draft head is incomplete: make it again with mambactl draft",
            )
        for key in reader.names():
            if key != IDS:
                tensor = reader.get(key)
                require_finite(reader.path, key, tensor)
                state[key].copy_(in_dtype(key, tensor, target.dtype))
    return head.requires_grad_(False).eval()


def require_target(reader: Reader, target: HybridForCausalLM, name: str) -> None:
    """Raise ModelError unless a head was made for the very weights of `target`."""
    fields = head_fields(reader)
    if fields.target_sha256 != weights_digest(target):
        made = f" (it was made for {fields.target})" if fields.target else ""
        raise ModelError(
            f"the draft {reader.path} was made for other weights than those of {name}{made}",
            f"give the model it was made for, or make another: mambactl draft {name}",
        )


def head_config(reader: Reader) -> HybridConfig:
    """Configuration of the layer of an open draft head."""
    values = {k: v for k, v in reader.config.items() if k not in ("model_type", "architectures")}
    config = build_config(reader, HybridConfig, values)
    if config.num_hidden_layers != 1 or len(config.attention_layers) != 1:
        raise ModelError(
            f"{reader.path} has {config.num_hidden_layers} layers, a draft head has one",
            "its config.json belongs to another model",
        )
    return config


def _ids(reader: Reader, vocabulary: int) -> Tensor:
    """The target's token of every row of the output [Vt]."""
    found = reader.get(IDS).long() if IDS in reader.names() else torch.empty(0)
    distinct = found.ndim == 1 and len(found) and len(found.unique()) == len(found)
    if not distinct or not 0 <= int(found.min()) <= int(found.max()) < vocabulary:
        raise ModelError(
            f"{reader.path} does not say which of {vocabulary:,} tokens it predicts",
            "the draft head is damaged: make it again with mambactl draft",
        )
    return found
