"""`eval --generation-agreement`: greedy texts of student and teacher behind the same prompts."""

from typing import TYPE_CHECKING

from pydantic import Field

from mambactl import console
from mambactl.evaluation.probes.probe import (
    STUDENT,
    TEACHER,
    Asked,
    Numbers,
    Probe,
    Subject,
)
from mambactl.json_values import JsonObject
from mambactl.options.evaluation import EvalOptions
from mambactl.options.fields import Tokens
from mambactl.present import present

if TYPE_CHECKING:
    from mambactl.decode.prompts import Prompt

# texts of both that are kept, and characters of each
SAMPLES, KEPT, LONGEST = "samples", 3, 600
Prompts = dict[str, "list[Prompt]"]


class AgreementOptions(EvalOptions):
    """Prompts, and how much is written behind them."""

    generation_agreement: str | None = Field(
        None, description="prompts (.txt, .jsonl): compare greedy texts with the teacher's"
    )
    generation_tokens: Tokens = Field(64, description="tokens per such text")


class AgreementProbe(Probe[AgreementOptions, Prompts, "dict[str, Numbers]"]):
    """Agreement of the greedy texts of student and teacher."""

    name, title, group = "generation", "Greedy texts", "greedy texts"
    about = (
        "Written behind the same prompts by student and teacher. Forced: the teacher's tokens that "
        "the student would have written next behind the teacher's own text."
    )
    by_set = True
    options = (AgreementOptions,)
    example = "--generation-agreement PROMPTS"

    def asked(self, config: AgreementOptions) -> bool:
        """True if there are prompts."""
        return bool(config.generation_agreement)

    def read(self, config: AgreementOptions, asked: Asked) -> Prompts:
        """Read `limit` prompts, which are one data set."""
        from mambactl.generation.decoding import read_prompts

        return {self.name: read_prompts(present(config.generation_agreement))[: config.limit]}

    def plan(self, inputs: Prompts | None) -> JsonObject:
        """Number of prompts, for a dry run."""
        return {"prompts": len(inputs[self.name]) if inputs else 0}

    def measure(
        self, config: AgreementOptions, inputs: Prompts, subject: Subject
    ) -> dict[str, Numbers]:
        """Decode greedily with both and compare, see `evaluation.agreement`."""
        from mambactl.decode.backend import make_engine
        from mambactl.decode.prompts import encode_all
        from mambactl.decode.sampler import SamplingParams
        from mambactl.evaluation.agreement import Pair, forced_agreement, generation_agreement
        from mambactl.generation.completion import complete, rows_together
        from mambactl.generation.decoding import end_tokens
        from mambactl.generation.detokenizer import text_of

        tokenizer = subject.tokenizer
        encoded = encode_all(inputs[self.name], tokenizer)
        texts = []
        with console.progress("generated texts", 2 * len(encoded)) as task:
            for model in (subject.model, present(subject.teacher)):
                params = SamplingParams(
                    max_new_tokens=config.generation_tokens,
                    eos_token_ids=end_tokens(model, tokenizer),
                )
                rows = rows_together(model.device, config.batch_size)
                engine = make_engine(model, None, 0)
                texts.append(
                    complete(
                        engine, tokenizer, encoded, params, (), rows, task.advance, subject.dealer
                    )
                )
        pairs = [Pair(*one) for one in zip(encoded, *texts, strict=True)]
        forced = forced_agreement(subject.model, pairs, config.batch_size, subject.dealer)
        numbers = {"prompts": len(pairs), "forced_agreement": forced}
        samples = [
            {
                "prompt": str(prompt.messages[-1]["content"])[:LONGEST],
                **{
                    who: text_of(tokenizer, tokens).strip()[:LONGEST]
                    for who, tokens in ((STUDENT, pair.student), (TEACHER, pair.teacher))
                },
            }
            for prompt, pair in list(zip(inputs[self.name], pairs, strict=True))[:KEPT]
        ]
        return {self.name: numbers | generation_agreement(pairs) | {SAMPLES: samples}}

    def show(self, subject: Subject, found: dict[str, Numbers]) -> None:
        """Print a line per number."""
        numbers = found[self.name]
        lines = [(each.name, each.shown(numbers)) for each in self.present([numbers])]
        title = f"greedy texts of {subject.source} against {subject.teacher_name}"
        console.table(title, ("", ""), lines)
        for one in numbers[SAMPLES]:
            console.log("\n".join(f"{who}: {text}" for who, text in one.items()))
