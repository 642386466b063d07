"""`eval --per-layer`: the error of every new mixer, fed by the teacher."""

from pydantic import Field

from mambactl import console
from mambactl.evaluation.probes.fidelity_probe import Texts
from mambactl.evaluation.probes.probe import (
    AGAINST,
    STUDENT,
    Asked,
    ByVariant,
    Numbers,
    Probe,
    Subject,
    require_text,
)
from mambactl.json_values import JsonObject
from mambactl.metrics import exact
from mambactl.options.evaluation import EvalOptions, rows_per_pass
from mambactl.present import of_kind, present


class LayerOptions(EvalOptions):
    """Option that asks for errors by layer."""

    per_layer: bool = Field(
        False, description="error of each new mixer against the teacher's attention, on --data"
    )


class LayerProbe(Probe[LayerOptions, Texts, ByVariant]):
    """Errors by data set, student and layer."""

    name, title = "layers", "Layers"
    about = (
        "Relative error of each new mixer's output, fed by the teacher; 1 is what a mixer gets "
        "that only puts out the mean."
    )
    options = (LayerOptions,)
    within = "fidelity"
    bounded = False

    def asked(self, config: LayerOptions) -> bool:
        """True if errors by layer are asked for."""
        return config.per_layer

    def validate(self, config: LayerOptions) -> None:
        """Raise UsageError without text."""
        require_text(config.per_layer, config)

    def read(self, config: LayerOptions, asked: Asked) -> Texts:
        """Rows by data set."""
        return asked.texts

    def match(self, config: LayerOptions, asked: Asked) -> None:
        """Raise UsageError where layers do not correspond."""
        from mambactl.checkpoint.vocabulary import model_config
        from mambactl.evaluation.layers import require_layers

        for spec in filter(None, (asked.source, config.against)):
            require_layers(model_config(spec), model_config(present(asked.teacher)))

    def labels(self, inputs: Texts) -> list[str]:
        """Return no labels: the data sets are named already."""
        return []

    def measure(self, config: LayerOptions, inputs: Texts, subject: Subject) -> ByVariant:
        """Measure both students."""
        from mambactl.data.format import encode_rows
        from mambactl.evaluation.layers import layer_errors
        from mambactl.models.hybrid import HybridForCausalLM

        found: dict[str, dict[str, Numbers]] = {}
        for name, rows in inputs.items():
            documents = [
                example.input_ids
                for example in encode_rows(rows, subject.tokenizer, rules=subject.rules)
            ]
            sizes = (config.max_length, rows_per_pass(config))
            found[name] = {}
            for who in (STUDENT, AGAINST):
                if who in subject.variants:
                    model = of_kind(HybridForCausalLM, subject.variants[who].model)
                    teacher = present(subject.teacher)
                    errors = layer_errors(model, teacher, documents, *sizes, subject.dealer)
                    found[name][who] = {str(layer): error for layer, error in errors.items()}
        return found

    def show(self, subject: Subject, found: ByVariant) -> None:
        """Print a line per replaced layer, a column per data set (and student)."""
        columns = {
            data if who == STUDENT else f"{data} ({who})": errors
            for data, students in found.items()
            for who, errors in students.items()
        }
        layers = sorted({int(layer) for errors in columns.values() for layer in errors})
        lines = [
            (str(n), *(exact(e[str(n)]) if str(n) in e else "-" for e in columns.values()))
            for n in layers
        ]
        if lines:
            title = f"relative error of the mixers of {subject.source}, each fed by the teacher"
            console.table(title, ("layer", *columns), lines)

    def keep(self, kept: Numbers, found: ByVariant) -> None:
        """Put the errors where the other numbers of a model are."""
        for data, students in found.items():
            for name, errors in students.items():
                section: JsonObject = kept if name == STUDENT else kept.setdefault(AGAINST, {})
                section.setdefault(self.name, {})[data] = errors
