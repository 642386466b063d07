"""The weights of the best measurement of a run, kept in its folder until the run ends."""

import math
from collections.abc import Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from mambactl.checkpoint.run_folder import RunFolder
from mambactl.json_values import AnyObject, JsonObject
from mambactl.ranks import from_main
from mambactl.train.consolidate import gathered, part

# a student that recalls nothing is a hundred times as bad as one that recalls all
LEAST_RECALL = 0.01


def score(measured: AnyObject) -> float:
    """The held-out KL over the share of the teacher's recall that is kept; less is better.

    So one per cent of recall is worth as much as one per cent of KL, whatever their sizes. What
    was not measured counts as 1.
    """
    kept = max(measured.get("recall_kept", 1.0), LEAST_RECALL)
    return measured.get("kl", 1.0) / kept


class BestWeights:
    """Weights with the smallest `score`; `parameters` are all that the run trains, by name.

    They lie in the folder as soon as they were measured, so a run that is resumed knows them.
    """

    def __init__(self, folder: RunFolder, parameters: Mapping[str, nn.Parameter]):
        self.folder, self.parameters = folder, parameters
        kept = folder.load_best()
        self.score = math.inf if kept is None else kept["measured"]["score"]
        self.split = any(isinstance(p, DTensor) for p in parameters.values())

    def offer(self, phase: str, step: int, measured: AnyObject) -> float:
        """Keep the weights as they are now if they are the best so far; return their score."""
        # last bits may differ between processes, but parts are gathered by all of them or by none
        found = from_main(score(measured)) if self.split else score(measured)
        if found < self.score:
            self.score = found
            self.folder.save_best(
                gathered(
                    {
                        "measured": {"phase": phase, "step": step, "score": found, **measured},
                        "parameters": {name: p.detach() for name, p in self.parameters.items()},
                    }
                )
            )
        return found

    @torch.no_grad()
    def restore(self) -> JsonObject | None:
        """Give the parameters the best weights; return their step and measurement, if any."""
        kept = self.folder.load_best()
        if kept is None:
            return None
        for name, value in kept["parameters"].items():
            self.parameters[name].copy_(part(value, self.parameters[name]))
        return kept["measured"]
