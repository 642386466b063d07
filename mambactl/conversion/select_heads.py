"""`convert --by head --select kl|recall`: choose the KV heads that keep attention by measuring.

No data is needed: the rows are generated, around a text of the package.
"""

from dataclasses import asdict
from typing import TYPE_CHECKING

import torch

from mambactl import console
from mambactl.conversion.choice import UNITS, Unit
from mambactl.conversion.gates import STEPS, gate_worth
from mambactl.conversion.ranking import Instruments, cells, criterion_of, headings
from mambactl.conversion.removal import EXCHANGES, Removals
from mambactl.conversion.replace import Replacement
from mambactl.data.sources import load_rows
from mambactl.evaluation.facts import fact_probe
from mambactl.evaluation.recall import RecallProbe, kv_probe, mqar_probe, recall_probes
from mambactl.files import recipe_folder
from mambactl.json_values import JsonObject
from mambactl.options import ConvertConfig
from mambactl.present import present

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# tokens of the short rows, beside those of --select-recall
SHORT_ROW = 256
# rows of each kind and length, and pairs of heads that are exchanged, where there is a GPU
FAST_ROWS = 4
FAST_EXCHANGES = 24
# text of the package, where none is given
TEXT = "quickstart.jsonl"


def package_text() -> list[str]:
    """Path of the text in the package, read where no other is given."""
    return [str(recipe_folder() / "data" / TEXT)]


def head_probes(
    config: ConvertConfig, tokenizer: "PreTrainedTokenizerBase", device: torch.device
) -> list[RecallProbe]:
    """Pairs and needles at two lengths; the text around the needles is what KL is measured on."""
    slow = device.type == "cpu"
    rows = 1 if slow else FAST_ROWS
    text = load_rows(config.select_data or package_text())
    lengths = sorted({SHORT_ROW, config.select_recall})
    needles = [fact_probe(tokenizer, text, length, rows, config.seed) for length in lengths]
    if config.select == "kl":
        return needles
    pairs = [kv_probe(tokenizer, lengths[0], rows, config.seed)]
    pairs.append(mqar_probe(tokenizer, lengths[0], rows, config.seed))
    if not slow:
        pairs += recall_probes(tokenizer, lengths[1:], rows, config.seed)
    return pairs + needles


def choose_heads(
    config: ConvertConfig,
    replacement: Replacement,
    instruments: Instruments,
    keep: int,
    unit_bytes: int,
) -> tuple[list[Unit], JsonObject]:
    """Measure and choose `keep` heads; prints the tables and returns what the lineage keeps."""
    base, spec = replacement.base, replacement.spec()
    form = spec.from_attention(base, replacement.form(), base.attention_layers[0])
    window = present(spec.window(form))
    units = UNITS[present(config.by)].of(base)
    texts = instruments.only(lambda probe: False, text=True)
    text_worth, exchanges = None, EXCHANGES
    # a CPU would train gates for an hour
    if instruments.head.weight.device.type == "cuda":
        exchanges = FAST_EXCHANGES
        with console.progress("gates", STEPS) as task:
            text_worth = gate_worth(texts, units, window, config.seed, task)
    removals = Removals(instruments, units, window, criterion_of(config), text_worth, exchanges)
    found = removals.run(keep)
    front = [
        {"kept": count, "kv_bytes_per_token": count * unit_bytes, **score.rounded()}
        for count, score in found.front.items()
    ]
    columns = headings(found.scores.values())
    console.table(
        f"KV heads that see {window.window} tokens and {window.sinks} sinks alone, the most "
        "missed first",
        ("head", *columns, "stays"),
        [
            (unit.name, *cells(found.scores[unit]), "yes" if unit in found.kept else "")
            for unit in found.ranking[: max(2 * keep, 10)]
        ],
    )
    console.table(
        "untrained, by the heads that stay",
        ("heads", *columns, "KV bytes/token"),
        [(count, *cells(score), f"{count * unit_bytes:,}") for count, score in found.front.items()],
    )
    return found.kept, {
        "measure": "removal",
        # what says how much text needs a head
        "text": "kl" if text_worth is None else "gates",
        "form": asdict(window),
        "ranking": [unit.name for unit in found.ranking],
        "scores": [{"head": u.name, **score.rounded()} for u, score in found.scores.items()],
        "front": front,
        "exchanged": found.exchanged,
    }
