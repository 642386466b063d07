"""Which layers keep attention when a share of them is replaced."""

from fractions import Fraction

from mambactl.errors import UsageError
from mambactl.models.config import HybridConfig


def kept_attention(layers: int, ratio: float, keep: list[int] | None = None) -> list[int]:
    """Layers that stay attention; `keep` overrides `ratio`. Raises UsageError when out of range.

    A ratio 1 - 1/n keeps layer i where i mod n == n - 1 and a ratio 1/n replaces i mod n == 0, as
    the models of arXiv 2408.15237 do; any other ratio spreads the kept layers evenly.
    """
    if keep is not None:
        wrong = [index for index in keep if not 0 <= index < layers]
        if wrong:
            raise UsageError(
                f"there is no layer {', '.join(map(str, wrong))} in a model of {layers} layers",
                f"layers to keep are numbered 0 to {layers - 1}",
            )
        return sorted(set(keep))
    if not 0 <= ratio <= 1:
        raise UsageError(f"ratio {ratio} is not between 0 and 1", "give, for example, --ratio 0.5")
    share = Fraction(ratio).limit_denominator(max(64, layers))
    if share == 1:
        return []
    if (1 / (1 - share)).denominator == 1:
        period = int(1 / (1 - share))
        return [index for index in range(layers) if index % period == period - 1]
    if (1 / share).denominator == 1:
        return [index for index in range(layers) if index % int(1 / share)]
    kept = layers - round(share * layers)
    return [(j + 1) * layers // kept - 1 for j in range(kept)]


def attention_to_keep(
    config: HybridConfig, ratio: float, kv_budget: int | None, itemsize: int
) -> int:
    """How many layers stay attention: what `ratio` leaves, or what fits in `kv_budget`.

    The budget is in bytes of keys and values per token, `itemsize` bytes a number.
    """
    if kv_budget is not None:
        return min(len(config.attention_layers), kv_budget // attention_bytes(config, itemsize))
    kept = kept_attention(config.num_hidden_layers, ratio)
    return len(set(kept) & set(config.attention_layers))


def attention_bytes(config: HybridConfig, itemsize: int) -> int:
    """Bytes of the keys and values that one attention layer keeps of one token."""
    return 2 * config.num_key_value_heads * config.head_dim * itemsize
