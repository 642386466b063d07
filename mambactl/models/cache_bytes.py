"""Bytes that a cache takes, from a configuration alone: no model is built."""

from collections.abc import Callable
from dataclasses import asdict, dataclass

from mambactl.models.layout import AnyLayout
from mambactl.models.mixers.settings import WindowSettings
from mambactl.models.mixers.sizes import AttentionSizes
from mambactl.models.session_size import SessionSize

# of a number of a recurrent state: fp32 always, but for weights in fp64
STATE_BYTES = 4
# tokens of a sequence that caches are compared at
LENGTHS = (1024, 8192, 32768)


@dataclass(frozen=True)
class SessionBytes:
    """Bytes of the cache of a decoding session, part by part.

    kv: keys and values with a slot for every token; windows: those in rings, beside recurrences;
    rings: projections that states are replayed from; states: recurrent states.
    """

    kv: int
    windows: int
    rings: int
    states: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.kv + self.windows + self.rings + self.states


def session_bytes(config: AnyLayout, itemsize: int, session: SessionSize) -> SessionBytes:
    """Bytes that the device engine (`decode.gpu`) allocates for the cache of a model.

    Its weights take `itemsize` bytes a number; scratch, which no step leaves behind, is not cache.
    """
    size = session.state_size(config.stores_every_step)
    numbers = {"kv": 0, "windows": 0, "rings": 0}
    for layer in config.layers:
        spec, settings = layer.spec, layer.settings
        numbers["kv"] += size.capacity * spec.full_kv_elements(config, settings)
        numbers["rings"] += size.slots * spec.ring_elements(settings)
        window = spec.window(settings)
        if window is not None:
            slots = window.sinks + size.window_slots(window.window)
            numbers["windows"] += slots * spec.window_kv_elements(config, settings)
    sizes = {name: size.batch * count * itemsize for name, count in numbers.items()}
    return SessionBytes(**sizes, states=size.batch * _state_bytes(config, itemsize))


def sequence_bytes(config: AnyLayout, itemsize: int, tokens: int) -> SessionBytes:
    """Bytes of the cache of one sequence of `tokens`, decoded without drafts: see `session_bytes`.

    Room for tokens to come is not counted.
    """
    return session_bytes(config, itemsize, SessionSize(1, tokens, 0))


def attention_bytes(config: AnyLayout, itemsize: int, tokens: int) -> int:
    """`sequence_bytes` with attention alone in every layer, as before any was replaced."""
    a_layer = AttentionSizes().full_kv_elements(config, None)
    return tokens * len(config.mixers) * a_layer * itemsize


def sequences(
    config: AnyLayout, itemsize: int, teacher: Callable[[int], int] | None = None
) -> dict[str, dict[str, float]]:
    """Bytes of one sequence by its tokens, of `LENGTHS`: part by part and in `total`.

    `teacher` gives those of the teacher for so many tokens; ours are then a `share` of them.
    """
    found: dict[str, dict[str, float]] = {}
    for tokens in LENGTHS:
        own = sequence_bytes(config, itemsize, tokens)
        found[str(tokens)] = {**asdict(own), "total": own.total}
        if teacher is not None:
            theirs = teacher(tokens)
            found[str(tokens)] |= {"teacher_total": theirs, "share": own.total / theirs}
    return found


def cache_bytes(config: AnyLayout, itemsize: int) -> dict[str, object]:
    """Bytes that a sequence takes once it is read (`models.cache.HybridCache`).

    Keys and values take bytes per token; states, inputs of convolutions and keys and values of
    windows (`window_bytes` of it) bytes per sequence. Windows are described with it.
    """
    per_token, per_sequence, windows = _bytes_read(config, itemsize)
    found = {"bytes_per_token": per_token, "bytes_per_sequence": per_sequence}
    return found | _windows(config.windows, windows)


def bytes_behind(config: AnyLayout, itemsize: int, tokens: int) -> int:
    """Bytes that a sequence takes once `tokens` of it are read; see `cache_bytes`."""
    per_token, per_sequence, _ = _bytes_read(config, itemsize)
    return per_sequence + tokens * per_token


def _bytes_read(config: AnyLayout, itemsize: int) -> tuple[int, int, int]:
    """Bytes per token, bytes per sequence, and those of windows among the latter."""
    per_token = inputs = windows = 0
    for layer in config.layers:
        spec, settings = layer.spec, layer.settings
        per_token += spec.full_kv_elements(config, settings)
        inputs += spec.conv_elements(settings)
        window = spec.window(settings)
        if window is not None:
            slots = window.sinks + window.window
            windows += slots * spec.window_kv_elements(config, settings)
    per_sequence = _state_bytes(config, itemsize) + (inputs + windows) * itemsize
    return per_token * itemsize, per_sequence, windows * itemsize


def _windows(spans: list[WindowSettings], size: int) -> dict[str, object]:
    if not spans:
        return {}
    alone = asdict(spans[0]) if len(spans) == 1 else {"windows": [asdict(span) for span in spans]}
    return {"window_bytes": size, **alone}


def state_elements(config: AnyLayout) -> int:
    """Numbers in the recurrent states of one sequence, all layers."""
    return sum(layer.spec.state_elements(layer.settings) for layer in config.layers)


def _state_bytes(config: AnyLayout, itemsize: int) -> int:
    return state_elements(config) * max(STATE_BYTES, itemsize)
