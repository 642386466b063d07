"""The hybrid decoder: configuration, model, cache, initialisation and its mixers.

Letters used in shape comments: B batch, T tokens, D width, H heads, P head dim, N state,
G groups, K draft length, V vocabulary, W conv width, S key slots, Ch channels.
"""
