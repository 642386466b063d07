"""Options as other programs spell them, and what they are called here."""

from collections.abc import Iterable
from typing import Protocol

# what is typed -> options that mean it, of which a command has one or none
SPELLINGS: dict[str, tuple[str, ...]] = {
    "--adapter": ("--lora",),
    "--assistant-model": ("--draft",),
    "--batch": ("--batch-size",),
    "--bs": ("--batch-size",),
    "--dataset": ("--data",),
    "--draft-model": ("--draft",),
    "--add-eos": ("--append-eos",),
    "--file": ("--prompts", "--data"),
    "--gamma": ("--k",),
    "--gpu": ("--device",),
    "--input": ("--prompt", "--data"),
    "--input-file": ("--prompts",),
    "--iterations": ("--max-steps", "--iters"),
    "--learning-rate": ("--lr",),
    "--max-length": ("--max-new-tokens",),
    "--max-output-tokens": ("--max-new-tokens",),
    "--max-tokens": ("--max-new-tokens",),
    "--message": ("--prompt",),
    "--logging-steps": ("--log-every",),
    "--n-predict": ("--max-new-tokens",),
    "--num-assistant-tokens": ("--k",),
    "--num-epochs": ("--epochs",),
    "--num-speculative-tokens": ("--k",),
    "--num-train-epochs": ("--epochs",),
    "--output": ("--out",),
    "--output-dir": ("--out",),
    "--output-path": ("--out",),
    "--overwrite": ("--force",),
    "--precision": ("--dtype",),
    "--random-seed": ("--seed",),
    "--report-to": ("--log-to",),
    "--save": ("--out",),
    "--speculative-model": ("--draft",),
    "--steps": ("--max-steps",),
    "--system-prompt": ("--system",),
    "--temp": ("--temperature",),
    "--text": ("--prompt",),
    "--torch-dtype": ("--dtype",),
    "--train-data": ("--data",),
}


class _Parameter(Protocol):
    opts: list[str]


def meant(typed: str, parameters: Iterable[_Parameter]) -> str | None:
    """The option of a command that somebody means who typed an unknown one; None for no idea."""
    known = {name for each in parameters for name in each.opts}
    return next((name for name in SPELLINGS.get(typed, ()) if name in known), None)
