"""The hybrid decoder: configuration, model, cache, initialisation and its mixers.

Letters used in shape comments: B batch, T tokens, D width, H heads, P head dim, N state,
G groups, K draft length, V vocabulary, W conv width, S key slots, Ch channels.

Words that have one meaning in the whole package:

- window: the last tokens that attention sees, by the model or beside a recurrence
- sinks: the first tokens of a document, which attention with a window sees too
- previous inputs: the W - 1 inputs before a row, which a convolution needs
- pass: one run of the layers over new tokens
- segment: the T tokens per sequence that a pass of the decode kernels adds
- step: one round of decoding (draft, verify, accept); in training, one update
- slot: where a cache or ring keeps the keys, values or projections of one position
- ring: a buffer whose slots positions share, the newest overwriting the oldest
- kept head: a KV head that attends to all of the past in a layer whose other heads were replaced
- state: what a recurrence remembers of all tokens so far
- record: what a recurrence needs to process one token again, kept for a rollback
- replay: processing kept tokens again, from a stored state
- cache: everything that the layers keep of earlier tokens
- session: the memory in which a batch is decoded on a device, and the graphs of its steps
- cursor: where in a cache a forward call starts
- rollback: returning a cache to an earlier length
- acceptance: the choice of how many drafted tokens stay
- progress: the integers on the device that say how far each sequence of a batch is
- rotation: position encoding of queries and keys, and of B and C, by angles (RoPE)
- placement: the device and the dtype of a command
- device map: the device of each block of a model that is spread over several
- stand-in: a module that takes the place of another while something is trained or measured
- turn: one message of a chat
- control: what an evaluation measures beside a student to say what its numbers are worth
"""
