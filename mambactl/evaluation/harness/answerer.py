"""A model that answers what tasks ask, together with the other processes of a run.

The main process alone reads tasks, makes prompts and scores; it tells the others what is asked, and
each answers its share of the batches.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import TYPE_CHECKING

from mambactl.decode.backend import AnyEngine, make_engine
from mambactl.decode.sampler import SamplingParams
from mambactl.evaluation.likelihood import BatchSize, Request, log_likelihoods
from mambactl.generation.completion import complete, rows_together
from mambactl.generation.dealer import ALONE, Dealer, unheard
from mambactl.json_values import JsonObject
from mambactl.models.hybrid import HybridForCausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Answerer:
    """Likelihoods and texts of one model; `advance` hears how many requests are done."""

    def __init__(
        self,
        model: HybridForCausalLM,
        tokenizer: "PreTrainedTokenizerBase",
        batch_size: BatchSize,
        dealer: Dealer = ALONE,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.batch_size: BatchSize = batch_size
        self.dealer = dealer

    @cached_property
    def _engine(self) -> AnyEngine:
        return make_engine(self.model, None, 0)

    def likelihoods(
        self,
        requests: Sequence[Request],
        max_length: int,
        advance: Callable[[int], None] = unheard,
    ) -> list[tuple[float, bool]]:
        """Score continuations as `evaluation.likelihood.log_likelihoods` does."""
        self._tell(
            lambda: {
                "requests": [(list(each.context), list(each.continuation)) for each in requests],
                "max_length": max_length,
            }
        )
        return log_likelihoods(
            self.model, requests, max_length, self.batch_size, advance, self.dealer
        )

    def texts(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        until: Sequence[str],
        advance: Callable[[int], None] = unheard,
    ) -> list[list[int]]:
        """Write texts behind prompts as `generation.completion.complete` does."""
        self._tell(
            lambda: {
                "prompts": [list(prompt) for prompt in prompts],
                "params": asdict(params),
                "until": list(until),
            }
        )
        rows = rows_together(self.model.device, self.batch_size)
        return complete(
            self._engine, self.tokenizer, prompts, params, until, rows, advance, self.dealer
        )

    def follow(self) -> None:
        """Answer a share of all that the main process is asked, until it has finished."""
        while asked := self.dealer.from_main(dict):
            if "requests" in asked:
                requests = [Request(*each) for each in asked["requests"]]
                self.likelihoods(requests, asked["max_length"])
            else:
                params = {
                    **asked["params"],
                    "eos_token_ids": tuple(asked["params"]["eos_token_ids"]),
                }
                self.texts(asked["prompts"], SamplingParams(**params), asked["until"])

    def finish(self) -> None:
        """Tell the others that nothing more is asked."""
        self._tell(dict)

    def _tell(self, asked: Callable[[], JsonObject]) -> None:
        if self.dealer.shared and self.dealer.leads:
            self.dealer.from_main(asked)
