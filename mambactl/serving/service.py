"""State that the routes of a server share: model name and bounds, tokenizer, scheduler."""

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from mambactl.data.chat_template import ChatRenderer
from mambactl.decode.open_batch import RowRequest
from mambactl.decode.prompts import Prompt, encode_with
from mambactl.decode.sampler import SamplingParams
from mambactl.errors import UsageError
from mambactl.options import ServeConfig
from mambactl.serving.prometheus import ServerMetrics
from mambactl.serving.refusals import Refused, not_ready, too_long
from mambactl.serving.request_fields import SamplingFields
from mambactl.serving.scheduler import Scheduler
from mambactl.serving.written_text import Job, WrittenText

# seconds between two pieces of a text for each row under way: handing pieces on takes time that
# decoding then lacks
PACE = 0.001
# bits of the seeds of requests that bring none
SEED_BITS = 63


@dataclass
class Service:
    """A model being served; `scheduler` is there once it is warm."""

    config: ServeConfig
    name: str
    renderer: ChatRenderer
    metrics: ServerMetrics = field(default_factory=ServerMetrics)
    key: str | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    scheduler: Scheduler | None = None
    max_length: int = 0
    vocabulary: int = 0
    rows: int = 0

    def __post_init__(self) -> None:
        self._seeds = random.Random(self.config.seed)
        self._rendering = asyncio.Lock()

    def ready(self) -> Scheduler:
        """The scheduler; Refused before the model is warm."""
        if self.scheduler is None:
            raise not_ready()
        return self.scheduler

    def require_model(self, name: str) -> None:
        """Raise Refused for another model than the one that is served."""
        if name != self.name:
            message = f"there is no model {name} here, but {self.name}"
            raise Refused(message, 404, param="model", code="model_not_found")

    async def encode(self, prompt: Prompt, chat: bool) -> list[int]:
        """Token ids of a prompt; Refused where the chat template refuses it, or it is empty."""
        # there is one process that renders
        async with self._rendering:
            try:
                ids = await asyncio.to_thread(encode_with, self.renderer, prompt, chat)
            except UsageError as error:
                raise Refused(str(error), param="messages" if chat else "prompt") from None
        if not ids:
            raise Refused("the prompt is empty", param="prompt")
        return ids

    def require_tokens(self, ids: Sequence[int]) -> list[int]:
        """Tokens that a client sent; Refused for what is no token of the model, and for none."""
        if not ids:
            raise Refused("the prompt is empty", param="prompt")
        if not 0 <= min(ids) <= max(ids) < self.vocabulary:
            message = f"tokens of this model are those from 0 to {self.vocabulary - 1}"
            raise Refused(message, param="prompt")
        return list(ids)

    def jobs(self, prompts: Sequence[list[int]], body: SamplingFields) -> list[Job]:
        """A job for every prompt; Refused where one does not fit."""
        if body.choices > self.rows:
            message = f"n is at most {self.rows} here: as many rows are written at once"
            raise Refused(message, param="n")
        most = self.config.max_queue + self.rows
        if len(prompts) > most:
            message = f"{len(prompts)} prompts: a request takes at most {most} here"
            raise Refused(message, param=body.asked_in)
        seed = self._seeds.getrandbits(SEED_BITS) if body.seed is None else body.seed
        jobs = []
        for number, ids in enumerate(prompts):
            room = self.max_length - len(ids)
            most = room if body.most_tokens is None else body.most_tokens
            if most > room or room < 1:
                raise too_long(len(ids), max(most, 1), self.max_length, body.asked_in)
            params = SamplingParams(
                temperature=1.0 if body.temperature is None else body.temperature,
                top_p=1.0 if body.top_p is None else body.top_p,
                max_new_tokens=most,
                seed=seed,
            )
            keys = range(number * body.choices, (number + 1) * body.choices)
            likely = body.alternatives is not None
            texts = [WrittenText(RowRequest(params, key, likely)) for key in keys]
            jobs.append(Job(ids, texts, time.monotonic()))
        return jobs

    def pace(self) -> float:
        """Seconds in which the tokens of an answer gather before its next piece."""
        running = self.ready().decoding.batch.running
        return PACE * running if running > 1 else 0.0
