"""Sizes of the memory that the device engine decodes a batch in: rows, tokens and slots."""

from dataclasses import dataclass

# tokens of capacity come in such pieces, so that a longer batch seldom needs new memory
CAPACITY_STEP = 256
# sequences from which on storing a state costs more than replaying many tokens
REPLAY_FROM = 8
# ring slots of that many sequences, where their windows leave room to replay a few tokens
MANY_SLOTS, REPLAY_TOKENS = 32, 8
LEAST_SLOTS = 8
# slots of a window come in such pieces, and so do those for drafts: with up to that many, rings
# are as large as without drafts, so that sums over their slots round alike
WINDOW_STEP = 16


@dataclass(frozen=True)
class StateSize:
    """Sizes of the state of a batch in one model.

    `capacity` tokens a sequence, `slots` of a ring of projections, and `ahead`: tokens behind the
    first one of a step that its passes may write.
    """

    batch: int
    capacity: int
    slots: int
    ahead: int

    @property
    def splits(self) -> int:
        """Programs that share the keys of a sequence: a power of two, of which few are compiled."""
        return 16 if self.batch <= 4 else max(1, 64 >> (self.batch - 1).bit_length())

    def window_slots(self, window: int) -> int:
        """Slots of the ring that keeps the keys of a window of `window` tokens, without sinks."""
        return _rounded_up(window + _rounded_up(max(self.ahead, 1), WINDOW_STEP), WINDOW_STEP)


@dataclass(frozen=True)
class SessionSize:
    """Up to `batch` sequences of up to `capacity` tokens, with at most `k` drafts a step."""

    batch: int
    capacity: int
    k: int

    @classmethod
    def holding(cls, rows: int, tokens: int, k: int) -> "SessionSize":
        """The memory for `rows` sequences that end with `tokens` tokens, prompt and new ones."""
        need = tokens + k + 2
        return cls(rows, _rounded_up(need, CAPACITY_STEP), k)

    def ring_limit(self, stores_every_step: bool) -> int:
        """Slots in use of the ring of projections that states are replayed from.

        Three before the stored state, two steps of k + 1 tokens, and a replay. With
        `stores_every_step` nothing else is replayed. 0 for plain decoding of few sequences: the
        state is stored after each token.
        """
        lazy = self.batch >= REPLAY_FROM and not stores_every_step
        if self.k == 0 and not lazy:
            return 0
        least = 2 * (self.k + 1) + 3
        return max(MANY_SLOTS, least + REPLAY_TOKENS) if lazy else least

    def state_size(self, stores_every_step: bool) -> StateSize:
        """Sizes of the state of a model whose layers do or do not store it at every step."""
        slots = max(LEAST_SLOTS, 1 << (self.ring_limit(stores_every_step) - 1).bit_length())
        return StateSize(self.batch, self.capacity, slots, ahead=self.k)


def _rounded_up(number: int, step: int) -> int:
    return -(-number // step) * step
