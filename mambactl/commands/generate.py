"""`generate`: continue prompts, plainly or with a draft, and print the text, or write answers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from mambactl import console
from mambactl.decode.stats import DecodeStats
from mambactl.generation import dataset, decoding
from mambactl.generation.question_set import QuestionSet
from mambactl.options import GenerateConfig
from mambactl.stage_result import StageResult


def run(
    config: GenerateConfig,
    source: str,
    out: Path | None = None,
    *,
    resume: bool = False,
    force: bool = False,
) -> StageResult:
    """Decode every prompt; the completions are the text, one after the other.

    With a `dataset` the answers go into the file `out` instead.
    """
    if config.dataset:
        return dataset.run(config, source, out, resume=resume, force=force)
    config.require_coherent()
    prompts = decoding.read(config)
    folder = decoding.prefix_folder(config)
    setup = replace(decoding.prepare(config, source, prompts), folder=folder)
    engine = setup.engine()
    with console.progress("generate", len(prompts) * config.max_new_tokens) as task:
        result = decoding.decode(
            engine, setup.prompts, setup.params, config.batch_size, task.advance
        )
    console.log(_summary(result.stats, config.prefix_cache))
    texts = [setup.text(tokens) for tokens in result.tokens]
    metrics = result.stats.as_dict() | {"finish": result.finish, "texts": texts}
    return StageResult(source, metrics, "\n".join(texts))


def plan(config: GenerateConfig, source: str) -> dict[str, Any]:
    """What would be decoded; writes nothing."""
    if config.dataset:
        return QuestionSet.of(config, source).plan()
    config.require_coherent()
    return decoding.plan(config, source, decoding.read(config))


def _summary(stats: DecodeStats, prefix_cache: str | None) -> str:
    parts = [
        f"{stats.prompt_tokens} prompt tokens in {stats.seconds['prefill']:.2f} s",
        f"{stats.tokens} tokens at {stats.tokens_per_second:.1f} tokens/s",
    ]
    if prefix_cache is not None:
        parts[1:1] = [decoding.from_files(stats.as_dict(), prefix_cache)]
    if stats.drafted:
        parts.append(f"{stats.tokens_per_step:.2f} tokens per step")
        parts.append(f"{stats.acceptance:.0%} of {stats.drafted} drafted tokens accepted")
    return ", ".join(parts)
