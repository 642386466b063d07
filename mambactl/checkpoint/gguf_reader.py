"""Read a GGUF: tensors dequantised one at a time, config and tokenizer rebuilt.

Of a Llama, or of a model with recurrent layers in the forms that `export` writes.
"""

import json
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from mambactl.checkpoint.config_fields import Fields
from mambactl.checkpoint.gguf_header import (
    FileFields,
    LlamaFields,
    TokenizerFields,
    all_parts,
    check_header,
)
from mambactl.checkpoint.gguf_recurrent import (
    ARCHITECTURES,
    RECURRENT_NAMES,
    RecurrentFields,
    layer_changes,
    recurrent_config,
)
from mambactl.checkpoint.reader import NUMBER_TYPES, NumberType, Reader
from mambactl.errors import ModelError, ResourceError
from mambactl.foreign import AGAIN, blamed, fitted, regular_size
from mambactl.json_values import JsonObject
from mambactl.models.mixers.sizes import FLOAT32_PARAMETERS

if TYPE_CHECKING:
    import torch

Read = TypeVar("Read", bound=Fields)

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    **RECURRENT_NAMES,
}
_OUTER_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_EMBEDDING = "model.embed_tokens.weight"
_ROPE_FACTORS = "rope_freqs.weight"
# llama.cpp's file types without quantisation; every other type was a 16 bit model before
_PLAIN_TYPES: dict[int | None, NumberType] = {0: NUMBER_TYPES["F32"], 1: NUMBER_TYPES["F16"]}
_ROWS = 8192


class GgufReader(Reader):
    """Tensors under their Hugging Face names, in the type the model had before quantisation."""

    def __init__(self, path: Path):
        parts = all_parts(path)
        path = parts[0]
        super().__init__(path)
        try:
            import gguf
        except ImportError as error:
            raise ResourceError("reading GGUF needs gguf", "pip install gguf") from error
        files = []
        for part in parts:
            size = regular_size(part)
            with blamed(part):
                check_header(part, size)
                files.append(gguf.GGUFReader(part))
        self._dequantize = gguf.dequantize
        self._fields = files[0].fields
        architecture = self._value("general.architecture")
        if architecture not in ("llama", *ARCHITECTURES):
            raise ModelError(
                f"{path} holds the architecture {architecture!r}",
                "GGUF input is supported for llama (which includes Mistral 7B), "
                f"{', '.join(ARCHITECTURES)}",
            )
        self._file = self._read(FileFields)
        self._about: LlamaFields | RecurrentFields = (
            self._read(LlamaFields)
            if architecture == "llama"
            else self._read(RecurrentFields, f"{architecture}.")
        )
        self._tensors = {tensor.name: tensor for file in files for tensor in file.tensors}
        names = (name for name in self._tensors if name != _ROPE_FACTORS)
        self._names = {self._renamed(_our_name(name, path)): name for name in names}
        if _EMBEDDING not in self._names or len(self.shape(_EMBEDDING)) != 2:
            raise ModelError(f"{path} has no token_embd.weight of rows", AGAIN)

    def _value(self, key: str) -> Any:
        with blamed(self.path, key):
            return self._fields[key].contents() if key in self._fields else None

    def _read(self, kind: type[Read], prefix: str = "") -> Read:
        """Metadata of the keys that are `prefix` and the aliases of `kind`."""
        keys = [field.alias for field in kind.model_fields.values() if field.alias]
        found = {key: self._value(prefix + key) for key in keys if prefix + key in self._fields}
        return fitted(kind, found, self.path, "its metadata")

    def _renamed(self, name: str) -> str:
        # of Mamba-2 the bias alone is left of the projection of dt
        grouped = getattr(self._about, "groups", None) is not None
        return name.replace("mamba.dt_proj.bias", "mamba.dt_bias") if grouped else name

    def names(self) -> list[str]:
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        stored = self._stored_shape(name)
        if not self._changed(name):
            return stored
        import torch

        return tuple(self._ours(name, torch.empty(stored, device="meta")).shape)

    def _stored_shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(size) for size in reversed(self._tensors[self._names[name]].shape))

    def number_type(self, name: str) -> NumberType:
        if name.rpartition(".")[2] in FLOAT32_PARAMETERS:
            return NUMBER_TYPES["F32"]
        return _PLAIN_TYPES.get(self._file.file_type, NUMBER_TYPES["BF16"])

    def get(self, name: str) -> "torch.Tensor":
        return self.dequantize(name, self.dtype(name))

    def dequantize(self, name: str, dtype: "torch.dtype") -> "torch.Tensor":
        """One tensor in `dtype`, a block of rows at a time so that fp32 never exists whole."""
        import torch

        tensor = self._tensors[self._names[name]]
        shape = self._stored_shape(name)
        out = torch.empty(shape, dtype=dtype)
        with blamed(self.path, name):
            for start in range(0, shape[0], _ROWS):
                rows = self._dequantize(tensor.data[start : start + _ROWS], tensor.tensor_type)
                out[start : start + _ROWS] = torch.from_numpy(
                    np.require(rows, requirements=["C", "W"])
                )
        if name.endswith(("q_proj.weight", "q_proj.bias")):
            return _unpermute(out, self.config["num_attention_heads"])
        if name.endswith(("k_proj.weight", "k_proj.bias")):
            return _unpermute(out, self.config["num_key_value_heads"])
        return self._ours(name, out)

    def _ours(self, name: str, stored: "torch.Tensor") -> "torch.Tensor":
        """A tensor as our mixers have it; a value that they cannot have becomes NaN."""
        change = self._changed(name)
        return stored if change is None else change(stored)

    def _changed(self, name: str) -> "Callable[[torch.Tensor], torch.Tensor] | None":
        return self._changes.get(name.partition(".mamba.")[2])

    @cached_property
    def _changes(self) -> "Mapping[str, Callable[[torch.Tensor], torch.Tensor]]":
        about = self._about
        return layer_changes(about) if isinstance(about, RecurrentFields) else {}

    @cached_property
    def config(self) -> JsonObject:  # pyright: ignore[reportIncompatibleVariableOverride]
        about = self._about
        if isinstance(about, RecurrentFields):
            biased = (name.partition(".self_attn.")[2] for name in self._names)
            letters = {name[0] for name in biased if name.endswith("_proj.bias")}
            return self._whole(recurrent_config(about, sorted(letters)))
        return self._whole(self._llama(about))

    def _whole(self, own: JsonObject) -> JsonObject:
        """Fields of an architecture with those of any model."""
        found = {
            **own,
            "vocab_size": self.shape(_EMBEDDING)[0],
            "rms_norm_eps": _short(self._about.epsilon),
            "rope_theta": self._about.rope_base,
            "tie_word_embeddings": "lm_head.weight" not in self._names,
            "hidden_act": "silu",
            "dtype": self.number_type("").name,
            "bos_token_id": self._file.bos,
            "eos_token_id": self._file.ends,
            "pad_token_id": self._file.pad,
        }
        if scaling := self._rope_scaling(found):
            found["rope_scaling"] = scaling
        return found

    def _llama(self, about: LlamaFields) -> JsonObject:
        if about.expert_count:
            raise ModelError(f"{self.path} is a mixture of experts", "give a dense Llama")
        return {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": about.width,
            "intermediate_size": about.inner,
            "num_hidden_layers": about.layers,
            "num_attention_heads": about.heads,
            "num_key_value_heads": about.shared_heads or about.heads,
            "head_dim": about.head_dim or about.width // about.heads,
            "max_position_embeddings": about.context,
            "attention_bias": any(name.endswith("q_proj.bias") for name in self._names),
        }

    def _rope_scaling(self, config: JsonObject) -> JsonObject | None:
        if _ROPE_FACTORS in self._tensors:
            with blamed(self.path, _ROPE_FACTORS):
                factors = np.array(self._tensors[_ROPE_FACTORS].data, dtype=np.float64)
            return _llama3_scaling(factors, config)
        kind = self._about.scaling
        if kind == "none":
            older = getattr(self._about, "linear", None)
            return {"rope_type": "linear", "factor": older} if older not in (None, 1) else None
        if kind == "linear" and self._about.factor is not None:
            return {"rope_type": "linear", "factor": self._about.factor}
        raise ModelError(f"{self.path} uses rope scaling {kind!r}", "linear and llama3 are read")

    @cached_property
    def files(  # pyright: ignore[reportIncompatibleVariableOverride]
        self,
    ) -> dict[str, str | bytes]:
        if "tokenizer.ggml.tokens" not in self._fields:
            return {}
        words = self._read(TokenizerFields)
        settings, backend = self._tokenizer(words)
        files = {
            "tokenizer.json": backend.to_str(),
            "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False),
            "generation_config.json": json.dumps(
                {k: v for k, v in self.config.items() if k.endswith("_token_id") and v is not None}
            ),
        }
        if words.chat_template:
            files["chat_template.jinja"] = words.chat_template
        return files

    def _tokenizer(self, words: TokenizerFields) -> tuple[JsonObject, Any]:
        from tokenizers import pre_tokenizers, processors

        from mambactl.models.transformers_names import gguf_tokenizer

        described = {"tokenizer_type": words.model, "pre_tokenizer_type": words.pre}
        for name in ("tokens", "scores", "token_type", "merges"):
            if (value := getattr(words, name)) is not None:
                described[name] = value
        if words.model == "gpt2" and not words.merges:
            raise ModelError(
                f"{self.path}: its tokenizer cannot be read: it has no merges",
                "make the GGUF again from the original model, or give that",
            )
        with blamed(self.path, "its tokenizer"):
            backend = gguf_tokenizer("llama", described)
        if words.pre == "smollm":
            # the library's mapping has no entry for it; SmolLM's merges never join digits
            digits = pre_tokenizers.Digits(individual_digits=True)
            split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
            backend.pre_tokenizer = pre_tokenizers.Sequence([digits, split])
        settings: JsonObject = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": self.config["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
        }
        for role in ("bos", "eos", "unk", "pad"):
            if (index := getattr(words, role)) is not None:
                if index >= len(words.tokens):
                    raise ModelError(f"{self.path}: the {role} token {index} is none of its", AGAIN)
                settings[f"{role}_token"] = words.tokens[index]
        begins = words.model == "llama" if words.add_bos is None else words.add_bos
        if begins and (bos := settings.get("bos_token")):
            with blamed(self.path, f"its bos token {bos!r}"):
                backend.post_processor = processors.TemplateProcessing(
                    single=f"{bos} $A",
                    pair=f"{bos} $A {bos} $B",
                    special_tokens=[(bos, words.bos)],
                )
        return settings, backend


def _our_name(name: str, path: Path) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in _OUTER_NAMES:
        return f"{_OUTER_NAMES[stem]}.{kind}"
    match name.split("."):
        case ["blk", index, "ssm_a"]:
            return f"model.layers.{index}.mamba.A_log"
        case ["blk", index, "ssm_d"]:
            return f"model.layers.{index}.mamba.D"
        case ["blk", index, part, kind] if part in _LAYER_NAMES:
            return f"model.layers.{index}.{_LAYER_NAMES[part]}.{kind}"
    raise ModelError(f"{path} holds the tensor {name!r}, which no Llama has", None)


def _unpermute(weight: "torch.Tensor", heads: int) -> "torch.Tensor":
    """Undo llama.cpp's interleaving of rotary pairs in the rows of q and k."""
    rows = weight.shape[0] // heads
    paired = weight.view(heads, rows // 2, 2, *weight.shape[1:])  # [H, P/2, 2, D]
    return paired.transpose(1, 2).reshape(weight.shape).contiguous()


def _short(value: float) -> float:
    # stored as fp32; the nearest short decimal is the number that was meant
    return float(f"{value:.5g}")


def _llama3_scaling(factors: np.ndarray, config: JsonObject) -> JsonObject:
    """The llama3 rope parameters whose per-frequency divisors are `factors`; raises ModelError."""
    low, high, original = 1.0, 4.0, 8192
    dim = config["head_dim"]
    if factors.shape != (dim // 2,) or dim % 2:
        raise ModelError(f"the GGUF has {factors.size} rope factors, not {dim // 2}", AGAIN)
    factor = _short(factors.max())
    wavelength = 2 * np.pi * config["rope_theta"] ** (np.arange(0, dim, 2) / dim)
    smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if not np.allclose(factors, expected, rtol=1e-3):
        raise ModelError("the GGUF's rope factors are not Llama 3's", "give the original model")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
