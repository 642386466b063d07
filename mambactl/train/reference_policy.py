"""Reference of a DPO run: log-probabilities computed once, and comparisons on held-out pairs."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from mambactl import console
from mambactl.checkpoint.run_folder import RunFolder, load_kept
from mambactl.data.preferences import Pair
from mambactl.errors import OutputError
from mambactl.evaluation.rewards import (
    HEADINGS,
    SCALARS,
    Layout,
    Reference,
    compare_preferences,
    documents,
    read_reference,
    token_logps,
)
from mambactl.files import replacing
from mambactl.foreign import blamed
from mambactl.json_values import AnyObject, JsonObject
from mambactl.ranks import is_main

# pairs that are asked about before their answers are kept
PIECE = 1024


def precomputed(
    folder: RunFolder, model: PreTrainedModel, pairs: Sequence[Pair], layout: Layout
) -> list[np.ndarray]:
    """Log-probabilities of all answer tokens of `pairs` [2 N].

    Kept in the folder piece by piece, so that a resumed run asks for nothing twice.
    """
    found: list[np.ndarray] = []
    for start in range(0, len(pairs), PIECE):
        piece = pairs[start : start + PIECE]
        path = folder.reference(start // PIECE)
        found += _kept(path, piece) or _asked(path, model, piece, layout)
    return found


def _kept(path: Path, pairs: Sequence[Pair]) -> list[np.ndarray] | None:
    if not path.exists():
        return None
    kept = load_kept(path)
    with blamed(path, kind=OutputError, hint="start again with --force"):
        if kept["digest"] != _digest(pairs):
            return None
        return np.split(kept["logps"].numpy(), np.cumsum(kept["lengths"].numpy())[:-1])


def _asked(
    path: Path, model: PreTrainedModel, pairs: Sequence[Pair], layout: Layout
) -> list[np.ndarray]:
    found = token_logps(model, documents(pairs), layout)
    if not is_main():
        return found
    content = {
        "digest": _digest(pairs),
        "logps": torch.from_numpy(np.concatenate(found)),
        "lengths": torch.tensor([len(part) for part in found]),
    }
    with replacing(path) as new:
        torch.save(content, new)
    return found


def _digest(pairs: Sequence[Pair]) -> str:
    digest = hashlib.sha256()
    for pair in pairs:
        for part in pair[2:]:
            digest.update(len(part).to_bytes(8, "big") + part.tobytes())
    return digest.hexdigest()


class HeldOutPreferences:
    """Numbers of every held-out set, always of the same pairs; draws no random number."""

    def __init__(
        self,
        policy: PreTrainedModel,
        reference: PreTrainedModel,
        sets: Mapping[str, Sequence[Pair]],
        layout: Layout,
        beta: float,
        every: int,
        steps: int,
    ):
        self.policy, self.sets, self.layout, self.beta = policy, sets, layout, beta
        self.every, self.steps = every, steps
        self.references: dict[str, Reference] = {
            name: read_reference(reference, documents(pairs), layout)
            for name, pairs in sets.items()
        }
        self.last: dict[str, JsonObject] = {}

    def measure(self) -> dict[str, JsonObject]:
        """Set -> what `compare_preferences` finds of the policy as it is now."""
        was_training = self.policy.training
        self.policy.eval()
        self.last = {
            name: compare_preferences(
                self.policy, self.references[name], pairs, self.layout, self.beta
            )
            for name, pairs in self.sets.items()
        }
        self.policy.train(was_training)
        return self.last

    def at(self, step: int) -> dict[str, float] | None:
        """Numbers by `held_out/SET/NUMBER` at every `every`-th step and the last, else None."""
        if not self.sets or (step % self.every and step != self.steps):
            return None
        return {
            f"held_out/{name}/{key}": found[key]
            for name, found in self.measure().items()
            for key in SCALARS
        }

    def farthest(self) -> float:
        """Largest KL to the reference, per answer token, in the last measurement."""
        return max((found["kl_to_reference"] for found in self.last.values()), default=0.0)


def show_held_out(before: Mapping[str, AnyObject], after: Mapping[str, AnyObject]) -> None:
    """Show a table of the numbers before and after training, by set."""
    lines = []
    for name, found in after.items():
        for when, numbers in (("before", before.get(name)), ("after", found)):
            if numbers is not None:
                cells = (f"{numbers[key]:.4f}" for key in SCALARS)
                lines.append((name, when, str(numbers["pairs"]), *cells))
    if lines:
        console.table("held-out preferences", ("set", "", "pairs", *HEADINGS), lines)
