"""`spec-decode`: speculative decoding measured against plain decoding of the same prompts."""

from mambactl import console
from mambactl.decode.backend import AnyEngine
from mambactl.decode.engine import Generation
from mambactl.decode.equality import require_equal
from mambactl.decode.sampler import SamplingParams
from mambactl.decode.stats import DecodeStats
from mambactl.generation import decoding
from mambactl.json_values import JsonObject
from mambactl.metrics import hundredths, tenths, tight_percent, times
from mambactl.options import SpecDecodeConfig
from mambactl.report.results import save_results
from mambactl.stage_result import StageResult

STAGE = "spec-decode"
WARMUP_TOKENS = 4


def run(config: SpecDecodeConfig, source: str) -> StageResult:
    """Decode twice and compare; CheckError when `check` finds another greedy token."""
    config.require_coherent()
    prompts = decoding.read(config)
    setup = decoding.prepare(config, source, prompts)
    plain_engine = setup.engine(plain=True, exact=config.check, share=False)
    engine = setup.engine(exact=config.check, share=False)
    _warm_up(setup, plain_engine, engine)
    total = 2 * len(prompts) * config.max_new_tokens
    with console.progress(STAGE, total) as task:

        def advance(number: int, new: list[int]) -> None:
            task.advance(len(new))

        plain, result = (
            decoding.decode(each, setup.prompts, setup.params, config.batch_size, advance)
            for each in (plain_engine, engine)
        )
    metrics = _metrics(config, plain, result)
    _show(config, source, plain.stats, result.stats, metrics)
    if config.check:
        ties = require_equal(setup.target, setup.prompts, plain.tokens, result.tokens)
        metrics |= {"ties": ties, "exact": True}
        same = f"every token of {len(prompts)} prompts equals plain decoding"
        console.log(f"{same}, but for {ties} that part at a tie of two logits" if ties else same)
        if setup.target.device.type == "cuda" or setup.rounded:
            console.log("times are of exact passes: without --check plain decoding is faster")
    if config.prompt is not None:
        return StageResult(source, metrics, setup.text(result.tokens[0]))
    stored = "" if config.weights == "auto" else f"-{config.weights}"
    save_results(STAGE, source, f"{config.draft}-k{config.k}{stored}", config, metrics)
    return StageResult(source, metrics, _report(metrics))


def plan(config: SpecDecodeConfig, source: str) -> JsonObject:
    """Describe the decoding; writes nothing."""
    config.require_coherent()
    prompts = decoding.read(config)
    return decoding.plan(config, source, prompts) | {"check": config.check}


def _warm_up(setup: decoding.Setup, *engines: AnyEngine) -> None:
    """Keep first-call costs out of the times."""
    few = SamplingParams(max_new_tokens=WARMUP_TOKENS)
    for engine in engines:
        engine.generate([setup.prompts[0]], few)


def _metrics(config: SpecDecodeConfig, plain: Generation, result: Generation) -> JsonObject:
    return {
        "draft": config.draft,
        "k": config.k,
        "acceptance": result.stats.acceptance,
        "tokens_per_step": result.stats.tokens_per_step,
        "tokens_per_second": result.stats.tokens_per_second,
        "plain_tokens_per_second": plain.stats.tokens_per_second,
        "speedup": _ratio(result.stats.tokens_per_second, plain.stats.tokens_per_second),
        "speedup_with_prefill": _ratio(
            result.stats.tokens_per_second_with_prefill,
            plain.stats.tokens_per_second_with_prefill,
        ),
        "identical": result.tokens == plain.tokens if config.temperature == 0 else None,
        "speculative": result.stats.as_dict(),
        "plain": plain.stats.as_dict(),
    }


def _show(
    config: SpecDecodeConfig,
    source: str,
    plain: DecodeStats,
    speculative: DecodeStats,
    metrics: JsonObject,
) -> None:
    title = f"{source} with {config.draft}, K = {config.k}, {plain.rows} prompts"
    columns = ("", "tokens", "tok/s", "+ prefill", "tok/step", "accepted")
    extra = {"plain": ("",), "speculative": (f"{speculative.acceptance:.1%}",)}
    if "draft" in speculative.seconds:
        # a step that is one CUDA graph has no parts to time
        share = speculative.seconds["draft"] / max(speculative.decode_seconds, 1e-9)
        columns += ("drafting",)
        extra = {"plain": ("", ""), "speculative": (*extra["speculative"], tight_percent(share))}
    rows: list[tuple[object, ...]] = [
        (
            name,
            stats.tokens,
            tenths(stats.tokens_per_second),
            tenths(stats.tokens_per_second_with_prefill),
            hundredths(stats.tokens_per_step),
            *extra[name],
        )
        for name, stats in (("plain", plain), ("speculative", speculative))
    ]
    rows.append(("gain", "", times(metrics["speedup"]), times(metrics["speedup_with_prefill"])))
    console.table(title, columns, rows)
    counts = (f"{n}: {steps}" for n, steps in sorted(speculative.histogram.items()))
    console.log(f"steps by accepted tokens: {', '.join(counts)}", level=2)


def _report(metrics: JsonObject) -> str:
    stats = metrics["speculative"]
    same = ", same tokens as plain decoding" if metrics["identical"] else ""
    return (
        f"acceptance {metrics['acceptance']:.3f}, {metrics['tokens_per_step']:.2f} tokens/step, "
        f"{metrics['tokens_per_second']:.1f} tokens/s, {metrics['speedup']:.2f}x plain decoding "
        f"({stats['rows']} prompts, {stats['tokens']} tokens{same})"
    )


def _ratio(one: float, other: float) -> float:
    return one / other if other else 0.0
