"""`generate`: continue prompts, plainly or with a draft, and print the text, or write answers."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from mambactl import console
from mambactl.decode.engine import Generation, OnTokens
from mambactl.generation import dataset, decoding
from mambactl.generation.detokenizer import Detokenizer
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
    config.require_coherent()
    if config.dataset:
        return dataset.run(config, source, out, resume=resume, force=force)
    prompts = decoding.read(config)
    if config.prompt is None and config.prompts is None:
        console.log("no prompt: the built-in ones follow; `mambactl chat` answers lines of stdin")
    folder = decoding.prefix_folder(config)
    setup = replace(decoding.prepare(config, source, prompts), folder=folder)
    engine = setup.engine()
    terminal = _terminal(config)

    def decode(on_tokens: OnTokens) -> Generation:
        return decoding.decode(engine, setup.prompts, setup.params, config.batch_size, on_tokens)

    if terminal is not None:
        result = _streamed(decode, setup, terminal)
    else:
        with console.progress("generate", len(prompts) * config.max_new_tokens) as task:
            result = decode(lambda _, new: task.advance(len(new)))
    console.log(decoding.summary(result.stats, config.prefix_cache))
    texts = [setup.text(tokens) for tokens in result.tokens]
    metrics = result.stats.as_dict() | {"finish": result.finish, "texts": texts}
    return StageResult(source, metrics, "\n".join(texts), written=terminal is not None)


def plan(config: GenerateConfig, source: str) -> dict[str, object]:
    """Describe the decoding; writes nothing."""
    if config.dataset:
        return QuestionSet.of(config, source).plan()
    config.require_coherent()
    return decoding.plan(config, source, decoding.read(config))


def _terminal(config: GenerateConfig) -> int | None:
    """The terminal that sees every token as it comes; None for pipes, and where rows alternate."""
    descriptor = console.text_descriptor()
    seen = descriptor is not None and config.batch_size == 1 and os.isatty(descriptor)
    return descriptor if seen else None


def _streamed(
    decode: Callable[[OnTokens], Generation], setup: decoding.Setup, terminal: int
) -> Generation:
    """Result of `decode`, streamed to the terminal while it is made, a line for each text."""
    texts = [Detokenizer(setup.tokenizer) for _ in setup.prompts]
    written = 0

    def show(number: int, new: list[int]) -> None:
        nonlocal written
        for done in texts[written:number]:
            console.write_piece(done.finish() + "\n", terminal)
        written = number
        console.write_piece(texts[number].add(new), terminal)

    result = decode(show)
    console.write_piece(texts[-1].finish() + "\n", terminal)
    return result
