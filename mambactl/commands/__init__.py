"""The commands, one file each; importing this package loads no heavy library."""
