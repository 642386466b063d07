"""One file per probe of `eval`."""
