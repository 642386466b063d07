"""`eval --generation-agreement`: what student and teacher write behind the same prompts."""

from typing import Any

from mambactl import console
from mambactl.decode.backend import make_engine
from mambactl.decode.prompts import Prompt, encode
from mambactl.decode.sampler import SamplingParams
from mambactl.evaluation.agreement import SCALARS, Pair, forced_agreement, generation_agreement
from mambactl.generation.completion import complete, rows_together
from mambactl.generation.decoding import end_tokens
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.options import EvalConfig


def measure(
    config: EvalConfig,
    prompts: list[Prompt],
    student: HybridForCausalLM,
    teacher: HybridForCausalLM,
    tokenizer: Any,
) -> dict[str, float]:
    """Decode greedily with both and compare, see `evaluation.agreement`."""
    encoded = [encode(prompt, tokenizer) for prompt in prompts]
    texts = []
    with console.progress("generated texts", 2 * len(encoded)) as task:
        for model in (student, teacher):
            params = SamplingParams(
                max_new_tokens=config.generation_tokens,
                eos_token_ids=end_tokens(model, tokenizer),
            )
            rows = rows_together(model.device, config.batch_size)
            engine = make_engine(model, None, 0)
            texts.append(complete(engine, tokenizer, encoded, params, (), rows, task.advance))
    pairs = [Pair(*one) for one in zip(encoded, *texts, strict=True)]
    found = generation_agreement(pairs)
    found["forced_agreement"] = forced_agreement(student, pairs, config.batch_size)
    return {"prompts": len(pairs)} | {name: found[name] for name in SCALARS}


def show(source: str, teacher: str, found: dict[str, float]) -> None:
    """A table of the numbers."""
    lines = [("prompts", f"{found['prompts']}")]
    lines += [(name, f"{found[name]:.4f}") for name in SCALARS]
    console.table(f"greedy texts of {source} against {teacher}", ("", ""), lines)
