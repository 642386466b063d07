"""Rankings of KV heads that come with the package, each measured once on the teacher it is for.

A teacher is known by its shape and by the Frobenius norms of its keys' and values' projections, so
that a copy in another type, or quantised, is the same teacher.
"""

import re
import shlex
from collections.abc import Iterator, Sequence

from pydantic import BaseModel, ConfigDict

from mambactl.checkpoint.adapted import Adapted
from mambactl.checkpoint.load import load_lineage, open_strict
from mambactl.checkpoint.reader import Reader
from mambactl.conversion.choice import Unit
from mambactl.errors import UsageError
from mambactl.files import recipe_folder
from mambactl.foreign import fitted, read_object
from mambactl.json_values import AnyObject, JsonObject
from mambactl.models.config import HybridConfig
from mambactl.options import ConvertConfig
from mambactl.options.fields import flags

FOLDER = "rankings"
# relative difference of two norms that are the same: bfloat16 and 4 bits a weight stay below
TOLERANCE = 0.01
PROJECTIONS = ("k_proj", "v_proj")
# fields of a configuration that are compared as they are
SHAPE = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
_DIGITS = 6
# of a selection, what says how good it is
MEASURED = ("select", "text", "recall_probe", "tokens", "front", "exchanged")

# name of a projection -> norm of each KV head's rows, by layer
Norms = dict[str, list[list[float]]]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


class RankedForm(_Record):
    """The window that heads outside had when they were ranked."""

    window: int
    sinks: int


class Ranking(_Record):
    """The KV heads of a teacher as LAYER.HEAD, those that are needed most first.

    `made` says how: the command, its version and what it measured on.
    """

    model: str
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    form: RankedForm
    made: JsonObject
    ranking: list[str]
    norms: Norms

    def fits(self, config: HybridConfig) -> bool:
        """True if a model has the shape of the teacher."""
        return all(getattr(self, name) == getattr(config, name) for name in SHAPE)

    def is_of(self, reader: Reader, adapted: Adapted) -> bool:
        """True if a checkpoint has the teacher's weights in the layers that are attention."""
        layers = adapted.config.attention_layers
        return bool(layers) and all(
            abs(found - self.norms[name][layer][head]) <= TOLERANCE * self.norms[name][layer][head]
            for name, layer, row in _norms(reader, adapted, layers)
            for head, found in enumerate(row)
        )

    def measured(self) -> JsonObject:
        """Record of the ranking for a lineage: its form, and how it was made."""
        return {"form": self.form.model_dump(), "made": self.made}

    def best(self, units: Sequence[Unit], keep: int) -> list[Unit]:
        """The `keep` heads of some that are needed most."""
        return sorted(sorted(units, key=lambda unit: self.ranking.index(str(unit.name)))[:keep])


def shipped_rankings() -> list[Ranking]:
    """Every ranking that comes with the package."""
    files = sorted((recipe_folder() / FOLDER).glob("*.json"))
    return [fitted(Ranking, read_object(file), file) for file in files]


def ranking_of(reader: Reader, adapted: Adapted) -> Ranking | None:
    """The ranking that was measured on this model, or None; reads keys' and values' projections
    where a teacher of that shape is known.
    """
    for ranking in shipped_rankings():
        if ranking.fits(adapted.config) and ranking.is_of(reader, adapted):
            return ranking
    return None


def ranking_from(student: str, model: str | None = None) -> Ranking:
    """The ranking to ship, of a student whose lineage holds one that `convert --select` measured.

    `model` is what the teacher is called, by default as the lineage names it. Raises UsageError
    where that conversion ranked no KV heads, ModelError where the teacher is not there.
    """
    lineage = load_lineage(student) or {}
    metrics, teacher = lineage.get("metrics", {}), lineage.get("parent", {}).get("path")
    selection = metrics.get("selection", {})
    if lineage.get("stage") != "convert" or selection.get("measure") != "removal" or not teacher:
        raise UsageError(
            f"{student} does not come from a conversion that ranked KV heads",
            "make it with convert --by head --select recall",
        )
    words = flags(ConvertConfig(**lineage["recipe"]))
    made = {
        "command": shlex.join(["mambactl", "convert", teacher, *words]),
        "created": lineage["created"],
        "versions": lineage["versions"],
        **{key: selection[key] for key in MEASURED if key in selection},
    }
    reader, adapted = open_strict(teacher)
    with reader:
        return record(model or teacher, reader, adapted, selection, made)


def record(
    model: str,
    reader: Reader,
    adapted: Adapted,
    selection: AnyObject,
    made: JsonObject,
) -> Ranking:
    """The ranking in a `selection` of form and ranking, with the norms of the teacher's weights."""
    config = adapted.config
    norms: Norms = {name: [] for name in PROJECTIONS}
    for name, _, row in _norms(reader, adapted, range(config.num_hidden_layers)):
        norms[name].append([float(f"{value:.{_DIGITS}g}") for value in row])
    return Ranking(
        model=model,
        **{name: getattr(config, name) for name in SHAPE},
        form=RankedForm(**selection["form"]),
        made=made,
        ranking=selection["ranking"],
        norms=norms,
    )


def written(ranking: Ranking) -> str:
    """A record as JSON, each of its lists on one line."""

    def on_one_line(match: re.Match[str]) -> str:
        return f"[{' '.join(match[1].split())}]"

    return re.sub(r"\[([^\[\]]*)\]", on_one_line, ranking.model_dump_json(indent=1)) + "\n"


def _norms(
    reader: Reader, adapted: Adapted, layers: Sequence[int]
) -> Iterator[tuple[str, int, list[float]]]:
    """Projection, layer and the norm of every KV head's rows, read one after the other."""
    heads = adapted.config.num_key_value_heads
    for name in PROJECTIONS:
        for layer in layers:
            weight = adapted.get(reader, f"model.layers.{layer}.self_attn.{name}.weight")
            yield name, layer, weight.float().unflatten(0, (heads, -1)).norm(dim=(1, 2)).tolist()
