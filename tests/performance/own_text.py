"""Students on text that they write themselves: KL to the teacher, repetition, answers that end.

    python -m tests.performance.own_text off=a.st on=b.st --teacher smollm2-135m \\
        --data chats.jsonl --tokens 256 --json > own-text.json

Every student, and the teacher after them, answers the same prompts (chats up to their last answer)
by sampling. `reverse_kl` is KL(student || teacher) over the tokens that it wrote, in nats per
token, `kl` the other direction; `repeating` the share of answers in which some four tokens in a row
occur four times or more; `ended` the share that an end token closes. Intervals are 95 % bootstrap
intervals over answers.
"""

import json
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from mambactl import console
from mambactl.checkpoint.load import load_model, load_tokenizer
from mambactl.checkpoint.vocabulary import stored_end_tokens
from mambactl.data.sources import load_rows
from mambactl.decode.backend import make_engine
from mambactl.decode.prompts import Prompt, encode_all
from mambactl.decode.sampler import SamplingParams
from mambactl.evaluation.fidelity import Variant, predict
from mambactl.evaluation.statistics import Bootstrap
from mambactl.json_values import JsonObject
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.ranks import placement
from mambactl.stage_result import StageResult
from tests.performance import command

PARSER = command.parser("own_text", __doc__)
PARSER.add_argument("students", nargs="+", metavar="NAME=MODEL")
PARSER.add_argument("--teacher", required=True)
PARSER.add_argument("--data", required=True, help="chats whose last answers are written anew")
PARSER.add_argument("--prompts", type=int, default=256, help="prompts at most")
PARSER.add_argument("--longest", type=int, default=768, help="tokens of a prompt at most")
PARSER.add_argument("--tokens", type=int, default=256, help="new tokens of an answer at most")
PARSER.add_argument("--temperature", type=float, default=1.0)
PARSER.add_argument("--batch-size", type=int, default=32)
# tokens in a row, and how often the same ones are a loop
GRAM, TIMES = 4, 4
TEACHER = "teacher"


def repeats(answer: Sequence[int]) -> bool:
    """True if some four tokens in a row occur four times or more."""
    grams = Counter(zip(*(answer[start:] for start in range(GRAM)), strict=False))
    return max(grams.values(), default=0) >= TIMES


def measure_student(
    student: HybridForCausalLM,
    teacher: HybridForCausalLM,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    batch_size: int,
) -> JsonObject:
    """Let a student answer every prompt, and compare it with the teacher on what it wrote."""
    engine = make_engine(student, None, 0, share=False)
    answers: list[Sequence[int]] = []
    ended = 0
    for start in range(0, len(prompts), batch_size):
        asked = prompts[start : start + batch_size]
        found = engine.generate(asked, params, keys=range(start, start + len(asked)))
        answers += found.tokens
        ended += sum(reason == "eos" for reason in found.finish)
    documents = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    predicted = predict({"s": Variant(student)}, teacher, documents, max(map(len, documents)))
    # position p predicts token p + 1
    starts = np.array([len(prompt) - 1 for prompt in prompts])[predicted.documents]
    written = predicted.positions >= starts
    of = predicted.documents[written]
    counts = np.bincount(of, minlength=len(prompts)).astype(float)
    numbers: JsonObject = {
        "answers": len(answers),
        "tokens": int(counts.sum()),
        "ended": ended / len(answers),
        "repeating": sum(map(repeats, answers)) / len(answers),
    }
    for name in ("reverse_kl", "kl", "agreement"):
        sums = np.bincount(of, predicted.values["s"][name][written], len(prompts))
        drawn = Bootstrap().draw(np.stack([sums, counts], 1), lambda t: t[..., 0] / t[..., 1])
        low, high = np.quantile(drawn, (0.025, 0.975))
        numbers[name] = float(sums.sum() / counts.sum())
        numbers[f"{name}_interval"] = [float(low), float(high)]
    return numbers


def measure(given: Namespace) -> StageResult:
    """Every student's numbers, and the teacher's own."""
    device, dtype = placement(command.configured(given))
    tokenizer = load_tokenizer(given.teacher)
    rows = [row for row in load_rows([given.data]) if "messages" in row]
    every = encode_all(map(Prompt.before_answer, rows), tokenizer)
    prompts = [prompt for prompt in every if len(prompt) <= given.longest][: given.prompts]
    teacher = load_model(given.teacher, device, dtype)
    params = SamplingParams(
        temperature=given.temperature,
        max_new_tokens=given.tokens,
        eos_token_ids=stored_end_tokens(given.teacher, tokenizer),
        seed=int(given.seed or 0),
    )
    metrics: JsonObject = {"prompts": len(prompts), "tokens_at_most": given.tokens}
    students: JsonObject = {}
    for argument in (*given.students, f"{TEACHER}={given.teacher}"):
        name, _, spec = argument.partition("=")
        student = teacher if name == TEACHER else load_model(spec, device, dtype)
        found = measure_student(student, teacher, prompts, params, given.batch_size)
        # so that a run that is cut short has said something
        console.log(f"{name}: {json.dumps(found)}")
        students[name] = found
        del student
        if device.type == "cuda":
            torch.cuda.empty_cache()
    metrics["students"] = students
    return StageResult(None, metrics, "\n".join(f"{k}: {v}" for k, v in students.items()))


if __name__ == "__main__":
    sys.exit(command.run(measure, PARSER.parse_args()))
