"""A model as lm-evaluation-harness sees it, scored and decoded by this program's own engines."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mambactl import console
from mambactl.data.chat_template import ChatRenderer, TemplateStopped
from mambactl.decode.sampler import SamplingParams
from mambactl.errors import UsageError
from mambactl.evaluation.harness.answerer import Answerer
from mambactl.evaluation.likelihood import BatchSize, Request
from mambactl.generation.dealer import ALONE, Dealer
from mambactl.json_values import JsonObject
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.present import of_kind, present

# rows where "auto" has to be a number
ROLLING_ROWS = 64
LONGER = "give a larger --task-max-length"
# what the decode engine takes; a request that asks for more goes to transformers
SAMPLING = {"do_sample", "temperature", "top_k", "top_p", "until", "max_gen_toks"}


if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM

    class HFLM(LM):
        """Interface of the harness's class that is used here; a decorator hides its types."""

        model: PreTrainedModel
        tokenizer: PreTrainedTokenizerFast
        max_length: int
        max_gen_toks: int
        eot_token_id: int | None
        prefix_token_id: int
        add_bos_token: bool | None
        chat_template_args: JsonObject

        def __init__(
            self,
            pretrained: PreTrainedModel,
            tokenizer: PreTrainedTokenizerBase,
            batch_size: BatchSize,
            max_length: int | None,
        ): ...

        def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list: ...

        def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list: ...

        def generate_until(self, requests: list, disable_tqdm: bool = False) -> list: ...

        def _loglikelihood_tokens(
            self, requests: list, disable_tqdm: bool, override_bs: int | None
        ) -> list: ...

        def tok_decode(self, tokens: object, skip_special_tokens: bool = True) -> str: ...

        def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]: ...

        def _model_call(self, inps: Tensor, *args: object, **kwargs: object) -> Tensor: ...

        def _model_generate(self, context: Tensor, *args: object, **kwargs: object) -> Tensor: ...

else:
    from lm_eval.models.huggingface import HFLM


class HarnessModel(HFLM):
    """The harness's wrapper of a transformers model, with this program's speed and progress.

    Requests are made, cut and answered as `HFLM` does it. Models that run code of their own are
    left to `HFLM` altogether.
    """

    def __init__(
        self,
        pretrained: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: BatchSize = 1,
        max_length: int | None = None,
        dealer: Dealer = ALONE,
    ):
        self._bar: console.Task | None = None
        self._answerer: Answerer | None = None
        self._renderer = ChatRenderer(tokenizer)
        # whether an answer failed here, and not in a task
        self.failed = False
        if isinstance(pretrained, HybridForCausalLM):
            self._answerer = Answerer(pretrained, tokenizer, batch_size, dealer)
        self._ours = self._answerer is not None
        rows = ROLLING_ROWS if self._ours and batch_size == "auto" else batch_size
        super().__init__(
            pretrained=pretrained, tokenizer=tokenizer, batch_size=rows, max_length=max_length
        )

    def finish(self) -> None:
        """Let the other processes of the run go on: nothing more is asked."""
        if self._answerer is not None:
            self._answerer.finish()

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A chat as text; a template that refuses it gets it once more, without system turns."""
        options = {
            **self.chat_template_args,
            "prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
        }
        try:
            return self._renderer.render(chat_history, **options)
        except TemplateStopped:
            raise
        except UsageError:
            rest = [message for message in chat_history if message["role"] != "system"]
            return self._renderer.render(rest, **options)

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list:
        """Log-likelihood of each continuation, and whether it is the greedy one."""
        with self._counting("likelihoods", len(requests)):
            if not self._ours:
                return super().loglikelihood(requests, disable_tqdm=True)
            pairs = [request.args for request in requests]
            whole = zip(pairs, *self._encode_pairs(pairs), strict=True)
            return self._loglikelihood_tokens(list(whole))

    def _loglikelihood_tokens(
        self, requests: list, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list:
        if not self._ours:
            return super()._loglikelihood_tokens(requests, True, override_bs)
        asked = [Request(context, continuation) for _, context, continuation in requests]
        longest = max((len(request.continuation) for request in asked), default=0)
        if longest > self.max_length:
            raise UsageError(
                f"an answer of {longest} tokens does not fit in the {self.max_length} tokens that "
                "are read",
                hint=LONGER,
            )
        answers = present(self._answerer).likelihoods(asked, self.max_length, self._advance)
        for (pair, _, _), answer in zip(requests, answers, strict=True):
            if pair is not None:
                self.cache_hook.add_partial("loglikelihood", pair, answer)
        return answers

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list:
        """Text generated after each context, up to a stop text."""
        with self._counting("generations", len(requests)):
            alike: dict[str, list[int]] = {}
            for index, request in enumerate(requests):
                alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
            texts = [""] * len(requests)
            for indices in alike.values():
                found = self._generate_alike([requests[index] for index in indices])
                for index, text in zip(indices, found, strict=True):
                    texts[index] = text
            return texts

    def _generate_alike(self, requests: "Sequence[Instance]") -> list[str]:
        """Answers to requests that have the same options."""
        _, asked = requests[0].arguments
        options: JsonObject = dict(normalize_gen_kwargs(asked, self.max_gen_toks))
        if not self._ours or not options.keys() <= SAMPLING:
            return super().generate_until(list(requests), disable_tqdm=True)
        end = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        until = handle_stop_sequences(options.get("until"), eos=end)
        room = self.max_length - options["max_gen_toks"]
        if room < 1:
            raise UsageError(
                f"answers of {options['max_gen_toks']} tokens leave no room for a question in the "
                f"{self.max_length} tokens of the model",
                hint=LONGER,
            )
        contexts = [request.args[0] for request in requests]
        encoded = self._encode_many(contexts)
        prompts = [encoded[text][-room:] or [self.prefix_token_id] for text in contexts]
        params = SamplingParams(
            temperature=options.get("temperature") or 0.0,
            top_k=options.get("top_k") or 0,
            top_p=options.get("top_p") or 1.0,
            max_new_tokens=options["max_gen_toks"],
            eos_token_ids=self._end_tokens(until),
        )
        found = present(self._answerer).texts(prompts, params, until, self._advance)
        texts = [
            postprocess_generated_text(self.tok_decode(tokens), until, None) for tokens in found
        ]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _end_tokens(self, until: Sequence[str]) -> tuple[int, ...]:
        """The end of a text, and stop texts that are one special token."""
        special = set(self.tokenizer.all_special_tokens) & set(until)
        ids = of_kind(list, self.tokenizer.convert_tokens_to_ids(sorted(special)))
        found = {self.eot_token_id, *ids}
        return tuple(sorted(token for token in found if token is not None))

    def _encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> tuple[list, list]:
        """`HFLM._encode_pair` of every request, tokenising all texts in one call."""
        moved = []
        for context, continuation in pairs:
            # white space at the end of a context belongs to the continuation's first token
            bare = context.rstrip() if context else ""
            moved.append((bare, context[len(bare) :] + continuation))
        encoded = self._encode_many(
            [text for bare, rest in moved if bare for text in (bare, bare + rest)]
        )
        contexts, continuations = [], []
        for (context, continuation), (bare, rest) in zip(pairs, moved, strict=True):
            if not bare:
                both = self._encode_alone(context, continuation)
            else:
                start = encoded[bare]
                both = start, encoded[bare + rest][len(start) :]
            contexts.append(both[0])
            continuations.append(both[1])
        return contexts, continuations

    def _encode_alone(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Encode a continuation of an empty context, behind the token that begins texts."""
        tokens = self.tok_encode(context + continuation, add_special_tokens=False)
        if tokens[0] == self.prefix_token_id:
            return tokens[:1], tokens[1:]
        return [self.prefix_token_id], tokens

    def _encode_many(self, texts: Sequence[str]) -> dict[str, list[int]]:
        """Return `tok_encode` of every text, by the text."""
        begin = self.tokenizer.decode(self.prefix_token_id)
        bare: dict[bool, dict[str, None]] = {True: {}, False: {}}
        for text in texts:
            bare[has_bos_prefix(text, begin)][text] = None
        found: dict[str, list[int]] = {}
        for begins, some in bare.items():
            special: JsonObject = (
                {} if self.add_bos_token is None else {"add_special_tokens": self.add_bos_token}
            )
            if begins:
                special = {"add_special_tokens": False}
            if some:
                ids = self.tokenizer(list(some), verbose=False, **special)["input_ids"]
                found |= zip(some, ids, strict=True)
        return found

    @contextmanager
    def _counting(self, label: str, total: int) -> Iterator[None]:
        # all chats are rendered: keep no copy of this process beside the model
        self._renderer.close()
        self.failed = True
        started = time.perf_counter()
        with console.progress(label, total) as self._bar:
            yield
        console.log(f"{label}: {total:,} in {time.perf_counter() - started:.2f} s", level=2)
        self._bar = None
        self.failed = False

    def _model_call(self, inps: Tensor, *args: object, **kwargs: object) -> Tensor:
        self._advance(len(inps))
        return super()._model_call(inps, *args, **kwargs)

    def _model_generate(self, context: Tensor, *args: object, **kwargs: object) -> Tensor:
        self._advance(len(context))
        return super()._model_generate(context, *args, **kwargs)

    def _advance(self, rows: int) -> None:
        if self._bar is not None and rows:
            self._bar.advance(rows)
