"""Options of `convert`."""

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal, Protocol

from pydantic import Field

from mambactl.errors import UsageError
from mambactl.options.fields import DataSpecs, HeadNames, Integers, MixerName, Tokens
from mambactl.options.launching import DeviceMapConfig, Processes

Form = Literal["faithful", "portable"]

# the window of the faithful form: the last tokens, and the first ones
WINDOW, SINKS = 64, 4
# mixers beside which there can be a window; the table of mixers needs torch
WITH_WINDOW = ("mamba2",)


class Span(Protocol):
    """A window of attention: the last `window` tokens and the first `sinks`."""

    @property
    def window(self) -> int: ...

    @property
    def sinks(self) -> int: ...


class Mixers(Protocol):
    """Protocol of the facts about mixers in a model's configuration."""

    @property
    def replaced_layers(self) -> Sequence[int]: ...

    @property
    def windows(self) -> Sequence[Span]: ...

    @property
    def rotates(self) -> bool: ...


class ConvertConfig(DeviceMapConfig):
    """Replace attention layers or KV heads by Mamba mixers."""

    more_specific: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "ratio": ("keep_attention", "keep_heads", "kv_budget")
    }

    ratio: float = Field(
        default=0.5, ge=0, le=1, description="share of attention replaced: of layers or KV heads"
    )
    form: Form | None = Field(
        default=None,
        description="faithful (default): by head, windows beside the state; portable: a state "
        "alone, by layer, which other engines can load",
    )
    by: Literal["layer", "head"] | None = Field(
        default=None, description="replace whole layers, or KV heads; default: as --form says"
    )
    keep_attention: Integers | None = Field(
        default=None, description="layers that stay attention (replaces by layer)"
    )
    keep_heads: HeadNames | None = Field(
        default=None,
        description="KV heads that stay attention, as LAYER.HEAD: 18.2,8.0 (replaces by head)",
    )
    select: Literal["uniform", "kl", "recall"] = Field(
        default="uniform",
        description="how they are chosen: by rule, or measured on text and recall",
    )
    select_data: DataSpecs = Field(
        default=[], description="text to choose them on; default: held-out rows of --calibrate"
    )
    select_tokens: int = Field(
        default=1024, ge=64, description="tokens of text a choice is measured on"
    )
    select_recall: Tokens = Field(
        default=1024, ge=64, description="tokens per recall row (--select recall)"
    )
    kv_budget: int | None = Field(
        default=None, ge=0, description="bytes of keys and values per token, in place of --ratio"
    )
    mixers_from: str | None = Field(
        default=None, description="take the mixers from this converted and aligned checkpoint"
    )
    mixer: MixerName = Field(default="mamba2", description="what replaces attention")
    window: int | None = Field(
        default=None,
        ge=1,
        description="keep attention to the last W tokens beside each new mixer; default: 64",
    )
    sinks: int | None = Field(
        default=None, ge=0, description="first tokens that the window sees as well; default: 4"
    )
    rotary: bool = Field(
        default=False,
        description="B and C of new mixers turn with the position, as keys and queries do",
    )
    init: Literal["calibrated", "reference"] = Field(
        default="calibrated", description="reference is the paper's Algorithm 1"
    )
    calibrate: DataSpecs = Field(
        default=[], description="text for the closed-form fit (calibrated init)"
    )
    calibrate_tokens: int = Field(default=10240, ge=512, description="tokens the fit may use")
    max_length: Tokens = Field(default=512, ge=16, description="tokens per calibration row")
    nproc: Processes = Field(
        default=None, ge=1, description="processes, one per GPU, that share what --select measures"
    )
    max_shard_gb: float = Field(
        default=5.0, gt=0, description="largest file of a folder, in 10^9 bytes"
    )

    @property
    def window_size(self) -> int:
        """Tokens of the window beside each new mixer, 0 without one; of completed options."""
        return self.window or 0

    @property
    def by_head(self) -> bool:
        """True if KV heads are asked for, by --by or by naming some."""
        return self.by == "head" or (self.by is None and self.keep_heads is not None)

    @property
    def by_layer(self) -> bool:
        """True if whole layers are asked for, by --by or by naming some."""
        return self.by == "layer" or (self.by is None and self.keep_attention is not None)

    def of_form(self, source: Mixers, aligned: Mixers | None) -> "ConvertConfig":
        """The options with form, unit, window and sinks decided.

        What is given counts, then the mixers of `aligned` (--mixers-from), then what other options
        leave possible, then what has replaced attention in the source. `form` stays None for a
        state alone that rotates, which is of neither form. Raises UsageError for contradictions.
        """
        self.require_coherent()
        if aligned is not None:
            self._require_form_of(aligned)
        form = self.form or self._form_of(source, aligned)
        if form == "portable":
            rotates = self.rotary or (aligned is not None and aligned.rotates)
            by_layer = {"form": None if rotates else form, "by": self.by or "layer"}
            return self.model_copy(update=by_layer)
        near = source if aligned is None else aligned
        span = near.windows[0] if near.windows else None
        window = self.window or (span.window if span else WINDOW)
        sinks = (span.sinks if span else SINKS) if self.sinks is None else self.sinks
        by = self.by or ("layer" if self.by_layer else "head")
        return self.model_copy(update={"form": form, "by": by, "window": window, "sinks": sinks})

    def _form_of(self, source: Mixers, aligned: Mixers | None) -> Form:
        if self.window or self.by_head:
            return "faithful"
        if aligned is not None:
            return "faithful" if aligned.windows else "portable"
        if self.mixer not in WITH_WINDOW or self.init == "reference":
            return "portable"
        if source.windows:
            return "faithful"
        return "portable" if self.by_layer or source.replaced_layers else "faithful"

    def require_coherent(self) -> None:
        """Raise UsageError for options that exclude each other whatever the models are."""
        if self.is_launched and self.select == "uniform":
            raise UsageError(
                "--nproc shares what --select measures; one process does the rest",
                "add --select recall, or drop --nproc",
            )
        super().require_coherent()
        if self.device_map is not None and self.select == "uniform":
            raise UsageError(
                "--device-map is for what --select measures; the rest goes layer by layer",
                "add --select recall, or drop --device-map",
            )
        if self.keep_heads is not None and self.keep_attention is not None:
            raise UsageError(
                "--keep-heads names KV heads and --keep-attention layers", "give one of them"
            )
        if self.form != "portable":
            return
        for given, option in (
            (self.window, "--window"),
            (self.sinks is not None, "--sinks"),
            (self.by == "head", "--by head"),
            (self.keep_heads is not None, "--keep-heads"),
            (self.rotary, "--rotary"),
        ):
            if given:
                raise UsageError(
                    f"--form portable is a state alone, by layer: it does not go with {option}",
                    f"drop {option}, or --form portable",
                )

    def _require_form_of(self, aligned: Mixers) -> None:
        """Raise UsageError where --form asks for another form than that of --mixers-from."""
        beyond = "have windows" if aligned.windows else "turn with the position"
        if self.form == "portable" and (aligned.windows or aligned.rotates):
            raise UsageError(
                f"the mixers of {self.mixers_from} {beyond}: their form is not portable",
                "drop --form portable, or align mixers of convert --form portable --ratio 1",
            )
        if self.form == "faithful" and not aligned.windows:
            raise UsageError(
                f"the mixers of {self.mixers_from} are a state alone, without windows",
                "drop --form faithful, or align mixers of convert --ratio 1",
            )

    def completed(self, source: str, describe: Callable[[str], Mixers]) -> "ConvertConfig":
        """The options with what MODEL and the checkpoint of --mixers-from decide."""
        aligned = None if self.mixers_from is None else describe(self.mixers_from)
        return self.of_form(describe(source), aligned)

    @classmethod
    def recorded(cls, options: Mapping[str, object]) -> dict[str, object]:
        """Options of a lineage; earlier versions had no forms, and replaced layers by default."""
        if "form" in options:
            return dict(options)
        by = options.get("by") or "layer"
        window = options.get("window") or (WINDOW if by == "head" else None)
        sinks = options.get("sinks")
        form = "faithful" if window else None if options.get("rotary") else "portable"
        span = {"window": window, "sinks": SINKS if window and sinks is None else sinks}
        return {**options, "form": form, "by": by, **span}
