"""Load models, tokenizers and lineage from any checkpoint, strictly."""

import math
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from mambactl import console
from mambactl.checkpoint.adapted import Adapted, in_dtype, require_finite
from mambactl.checkpoint.adapters import granite, llama, mamba, olmo, own, qwen, smollm
from mambactl.checkpoint.card import model_card
from mambactl.checkpoint.config_fields import GenerationFields, Identity, read_fields
from mambactl.checkpoint.head_layout import require_model
from mambactl.checkpoint.opening import open_checkpoint
from mambactl.checkpoint.plain_config import PLAIN
from mambactl.checkpoint.reader import Reader
from mambactl.checkpoint.resolve import resolve, tokenizer_folder
from mambactl.checkpoint.safetensors_reader import read_lineage
from mambactl.checkpoint.save import stored_dtype
from mambactl.checkpoint.side_files import read_config, read_side_files
from mambactl.checkpoint.text_growth import TOKENIZER, require_bounded_growth
from mambactl.errors import ModelError, ResourceError
from mambactl.files import CONFIG, Source
from mambactl.foreign import AGAIN, blamed, json_object
from mambactl.json_values import AnyObject, JsonObject
from mambactl.lineage import Origin, origin_of
from mambactl.models.config import HybridConfig
from mambactl.models.device_map import DeviceMap, Rooms, Sizes
from mambactl.models.hybrid import HybridForCausalLM
from mambactl.models.positions import RotaryEmbedding

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@dataclass(frozen=True)
class Format:
    """One kind of checkpoint: its class in transformers (None: it names none) and its adapter."""

    architecture: str | None
    adapt: Callable[[Reader], Adapted]


# `model_type` in config.json -> how such a checkpoint is read
FORMATS = {
    "mambactl_hybrid": Format(PLAIN["mambactl_hybrid"], own.adapt),
    "llama": Format(PLAIN["llama"], llama.adapt),
    "mistral": Format(PLAIN["mistral"], llama.adapt),
    "qwen2": Format(PLAIN["qwen2"], qwen.adapt_qwen2),
    "qwen3": Format(PLAIN["qwen3"], qwen.adapt_qwen3),
    "smollm3": Format("SmolLM3ForCausalLM", smollm.adapt),
    "olmo2": Format("Olmo2ForCausalLM", olmo.adapt),
    "granite": Format("GraniteForCausalLM", granite.adapt),
    "mamba": Format("MambaForCausalLM", mamba.adapt),
    "mamba2": Format("Mamba2ForCausalLM", mamba.adapt),
    mamba.STATE_SPACES: Format(None, mamba.adapt),
}


def adapt(reader: Reader) -> Adapted:
    """Our config and names for an open checkpoint; raises ModelError for other architectures."""
    identity = read_fields(Identity, reader.config, reader.path)
    kind = _kind(identity)
    require_model(reader.config, reader.path)
    known = FORMATS.get(kind or "")
    named = (identity.architectures or [known and known.architecture])[0]
    if known is None:
        raise _unsupported(reader, f"{named or 'unnamed'} (model_type {kind!r})")
    # an older spelling of Llama's differs in its capitals alone
    if known.architecture and known.architecture.casefold() != (named or "").casefold():
        raise _unsupported(reader, named or "unnamed")
    if identity.quantization_config:
        raise ModelError(
            f"{reader.path} is quantised", "give the unquantised checkpoint, or a GGUF of it"
        )
    adapted = known.adapt(reader)
    _require_rotary(reader.path, adapted.config)
    return adapted


def needs_remote_code(config: AnyObject, path: Path) -> bool:
    """Return whether loading the checkpoint at `path` requires Python code that it ships."""
    identity = read_fields(Identity, config, path)
    return bool(identity.auto_map) and _kind(identity) not in FORMATS


def _kind(identity: Identity) -> str | None:
    if identity.model_type is None and identity.ssm_cfg is not None:
        return mamba.STATE_SPACES
    return identity.model_type


def _unsupported(reader: Reader, what: str) -> ModelError:
    named = [known.architecture for known in FORMATS.values() if known.architecture]
    supported = ", ".join([*named, "state-spaces/mamba*"])
    message = f"{reader.path} has the architecture {what}, which is not supported"
    if needs_remote_code(reader.config, reader.path):
        code = ", ".join(sorted({str(name) for name in reader.config["auto_map"].values()}))
        message += f" and needs code from the checkpoint ({code})"
    return ModelError(message, f"supported: {supported}")


GENERATION = "generation_config.json"
_NEOX = "EleutherAI/gpt-neox-20b"
_NAMES_SHOWN = 5
# a tokenizer of another library, and what reads it -> the module
SENTENCES = "tokenizer.model"
SENTENCE_PACKAGES = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
# every tokenizer has to read this
_PROBE = "The first of 2 lines.\n"


@console.doing("loading weights")
def load_model(
    spec: str | Source,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    rooms: Rooms | None = None,
) -> HybridForCausalLM:
    """The model in eval mode, in its stored type unless `dtype`; A_log, D and dt_bias are fp32.

    With `rooms` it may go to several devices, in place of `device`. Raises ResourceError where it
    does not fit there, ModelError naming every missing, unexpected and misshaped tensor. Code
    inside a checkpoint runs only with `trust_remote_code`, for architectures that are not ours; the
    result is then that code's own model, good as a teacher or a baseline.
    """
    source = resolve(spec) if isinstance(spec, str) else spec
    with open_checkpoint(source) as reader:
        if trust_remote_code and needs_remote_code(reader.config, reader.path):
            # code of the checkpoint's own, whose logits are all that a caller asks of it
            if rooms is not None:
                raise _unmapped(source)
            return cast(HybridForCausalLM, _load_foreign(source, device, dtype))
        adapted = adapt(reader)
        model = empty_model(adapted.config)
        check(reader, adapted, model)
        where = DeviceMap(torch.device(device))
        if rooms is not None:
            kind = dtype or reader.dtype(adapted.names[EMBEDDING])
            where = DeviceMap.of(Sizes.of(model, kind), rooms)
        state = {}
        for name in adapted.names:
            tensor = adapted.get(reader, name)
            tensor = tensor.to(where.device_of(name))
            state[name] = in_dtype(name, tensor, stored_dtype(name, dtype or tensor.dtype))
        files, origin = reader.files, _origin(reader, adapted.config)
    if adapted.config.tie_word_embeddings:
        state[HEAD] = state[EMBEDDING]
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    model.config.dtype = state[EMBEDDING].dtype
    model.generation_config = _generation_config(source.path, files, model)
    model.origin = origin
    if not where.blocks:
        return model.to(where.first).eval()
    where.settle(model)
    console.log(f"{source.path}: {where.describe()}")
    return model.eval()


def open_strict(spec: str | Source) -> tuple[Reader, Adapted]:
    """An open reader and its adapter, after the same checks that loading makes."""
    reader = open_checkpoint(spec)
    try:
        adapted = adapt(reader)
        check(reader, adapted, empty_model(adapted.config))
    except BaseException:
        reader.close()
        raise
    return reader, adapted


def empty_model(config: HybridConfig) -> HybridForCausalLM:
    """The model with parameters that have shapes but no memory."""
    with torch.device("meta"):
        model = HybridForCausalLM(config)
    # rotary frequencies are computed at construction, never stored
    model.model.rotary_emb = RotaryEmbedding(config)
    return model


def _require_rotary(path: Path, config: HybridConfig) -> None:
    """Raise ModelError where a config describes no rotary angles that can be computed."""
    with blamed(path, f"rope_parameters in {CONFIG}"):
        rotary = RotaryEmbedding(config)
        # some kinds have other frequencies beyond the positions that were trained
        for position in (0, config.max_position_embeddings):
            rotary(torch.zeros(1), torch.tensor([[position]]))
        if not (rotary.inv_freq.isfinite().all() and math.isfinite(rotary.attention_scaling)):
            raise ModelError(
                f"{path}: the rope_parameters in {CONFIG} give no finite angles", AGAIN
            )


def check(reader: Reader, adapted: Adapted, model: HybridForCausalLM) -> None:
    """Compare names and shapes with what the config implies; raises ModelError naming them."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if adapted.config.tie_word_embeddings:
        expected.pop(HEAD, None)
        _check_tied(reader, adapted)
    wrong = []
    for name, origin in adapted.names.items():
        if name in expected:
            found = reader.shape(origin)
            if found != expected[name]:
                wrong.append(f"{origin} is {list(found)}, not {list(expected[name])}")
            elif not reader.dtype(origin).is_floating_point:
                wrong.append(f"{origin} is stored as {reader.dtype(origin)}")
    problems = [
        _listed("missing", sorted(expected.keys() - adapted.names.keys())),
        _listed("unexpected", sorted(adapted.names.keys() - expected.keys())),
        _listed("misshaped", wrong),
    ]
    if any(problems):
        raise ModelError(
            f"{reader.path} does not fit its config: {'; '.join(filter(None, problems))}",
            "the checkpoint is incomplete, or config.json belongs to another model",
        )


@console.doing("loading a tokenizer")
def load_tokenizer(spec: str, trust_remote_code: bool = False) -> "PreTrainedTokenizerFast":
    """The tokenizer a checkpoint carries; a missing pad token becomes the end token."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    source = resolve(spec)
    files, config = _tokenizer_files(source)
    if TOKENIZER in files:
        require_bounded_growth(files[TOKENIZER], source.path)
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            data = content.encode("utf-8") if isinstance(content, str) else content
            path = Path(folder) / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
        if TOKENIZER not in files and SENTENCES in files:
            _require_sentencepiece(source)
        with blamed(source.path, ", ".join(name for name in files if name != GENERATION)):
            if TOKENIZER in files:
                # not Auto: classes like GPT2Tokenizer rebuild the pipeline, lose digit splitting
                tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
            else:
                tokenizer = AutoTokenizer.from_pretrained(
                    folder, trust_remote_code=trust_remote_code
                )
            _try(tokenizer)
    # special tokens beyond the vocabulary are common, and harmless while no text has them
    rows = read_fields(Identity, config, source.path).vocab_size
    if rows is not None and tokenizer.vocab_size > rows:
        raise ModelError(
            f"{source.path} has a tokenizer of {tokenizer.vocab_size} tokens, its model has {rows}",
            "its tokenizer.json belongs to another model",
        )
    tokenizer.name_or_path = spec
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _require_sentencepiece(source: Source) -> None:
    """Raise ResourceError where what reads a tokenizer.model is not installed."""
    missing = [package for package, module in SENTENCE_PACKAGES.items() if not _installed(module)]
    if missing:
        raise ResourceError(
            f"the tokenizer of {source.path} is {SENTENCES} alone, which needs "
            f"{' and '.join(missing)}",
            f"pip install {' '.join(missing)}",
        )


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _try(tokenizer: "PreTrainedTokenizerFast") -> None:
    """Try a tokenizer and its templates: some are read without complaint and fail at first use."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    tokenizer.decode(tokenizer(_PROBE)["input_ids"])
    templates = tokenizer.chat_template or ""
    for template in templates.values() if isinstance(templates, dict) else [templates]:
        if template:
            _compile_jinja_template(template)


def load_lineage(spec: str) -> JsonObject | None:
    """The content of mambactl.json, or None for a checkpoint that mambactl did not write."""
    source = resolve(spec)
    return None if source.kind == "gguf" else read_lineage(source.path)


def _tokenizer_files(source: Source) -> tuple[Mapping[str, str | bytes], AnyObject]:
    """Return the tokenizer files of a checkpoint and its config.json."""
    if source.kind == "folder":
        files = read_side_files(source.path)
        raw = read_config(source.path) if os.path.exists(source.path / CONFIG) else {}
    else:
        with open_checkpoint(source) as reader:
            files, raw = reader.files, reader.config
    if any(name in files for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return files, raw
    if "ssm_cfg" in raw:
        # state-spaces publishes weights alone; all its models share this tokenizer, and pad their
        # vocabularies beyond what their configs say
        return read_side_files(tokenizer_folder(_NEOX)), {}
    require_model(raw, source.path)
    raise ModelError(
        f"{source.path} has no tokenizer", "copy tokenizer.json of the original model into it"
    )


def _check_tied(reader: Reader, adapted: Adapted) -> None:
    if HEAD not in reader.names() or EMBEDDING not in adapted.names:
        return
    if not torch.equal(reader.get(HEAD), adapted.get(reader, EMBEDDING)):
        raise ModelError(
            f"{reader.path} says tie_word_embeddings, but its {HEAD} differs from the embedding",
            "set tie_word_embeddings to false in config.json",
        )


def _listed(label: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return f"{len(names)} {label} ({', '.join(names[:_NAMES_SHOWN])}{more})"


def _generation_config(
    path: Path, files: Mapping[str, str | bytes], model: HybridForCausalLM
) -> "GenerationConfig":
    from transformers import GenerationConfig

    if GENERATION not in files:
        return GenerationConfig.from_model_config(model.config)
    values = json_object(files[GENERATION], path, GENERATION)
    read_fields(GenerationFields, values, path, GENERATION)
    with blamed(path, GENERATION):
        return GenerationConfig.from_dict(values)


def _origin(reader: Reader, config: HybridConfig) -> Origin | None:
    """Record of how the checkpoint was made; a single file has no card of its own."""
    if reader.path.is_dir():
        return origin_of(reader.path)
    if reader.lineage is None:
        return None
    return Origin(reader.path, reader.lineage, model_card(reader.lineage, config))


def _unmapped(source: Source) -> ModelError:
    return ModelError(
        f"{source.path} runs code of its own, which stays on one device", "drop --device-map"
    )


def _load_foreign(
    source: Source, device: str | torch.device, dtype: torch.dtype | None
) -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM

    if source.kind != "folder":
        raise ModelError(f"{source.path} needs code, which only a folder carries", "give a folder")
    with blamed(source.path, hint="its own code failed on it"):
        model = AutoModelForCausalLM.from_pretrained(
            source.path, trust_remote_code=True, dtype=dtype or "auto"
        )
    for name, tensor in model.state_dict().items():
        require_finite(source.path, name, tensor)
    return model.to(device).eval()  # pyright: ignore[reportArgumentType]
