"""One engine for plain and speculative decoding; plain decoding is speculation with K = 0."""
