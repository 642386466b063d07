"""The table of forms that `export` writes: what each is made of, and how it is read again."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from mambactl.checkpoint.container import Container, TensorFile
from mambactl.checkpoint.gguf_writer import GgufFile
from mambactl.checkpoint.load import load_model
from mambactl.checkpoint.pickle_writer import PickleFolder
from mambactl.checkpoint.publishing import WorkFolder
from mambactl.export.exported_form import Form, Origin
from mambactl.export.round_trip import CausalModel, load_by_transformers
from mambactl.export.to_gguf import gguf_form
from mambactl.export.to_mamba_ssm import mamba_ssm_form
from mambactl.export.to_mambainllama import mambainllama_form
from mambactl.export.to_transformers import transformers_form
from mambactl.files import LINEAGE, Source
from mambactl.models.config import HybridConfig
from mambactl.options.exporting import ExportConfig

Texts = Mapping[str, str | bytes]


@dataclass(frozen=True)
class Target:
    """A form of another program.

    `make` describes a model in it, or refuses; `open_file` makes what is written, with texts beside
    the tensors; `load` reads that again; `side` names what lies beside a single file. `converts`
    says that the file itself brings tensors into the type that is asked for.
    """

    make: Callable[[Origin, ExportConfig], Form]
    open_file: Callable[[WorkFolder, Form, ExportConfig, str, Texts], TensorFile]
    load: Callable[[Path, HybridConfig], CausalModel]
    side: tuple[str, ...] = ()
    converts: bool = False


def _safetensors(
    work: WorkFolder, form: Form, config: ExportConfig, dtype: str, texts: Texts
) -> Container:
    fields = form.config | {"dtype": dtype}
    return Container(work.result, False, fields, texts, None, config.max_shard_gb * 1e9)


def _pickled(
    work: WorkFolder, form: Form, config: ExportConfig, dtype: str, texts: Texts
) -> PickleFolder:
    return PickleFolder(work.result, form.config, texts, None, form.aliases)


def _gguf(work: WorkFolder, form: Form, config: ExportConfig, dtype: str, texts: Texts) -> GgufFile:
    beside = work.path / LINEAGE
    return GgufFile(work.result, beside, form.architecture, form.config, dtype, None)


def _released(
    work: WorkFolder, form: Form, config: ExportConfig, dtype: str, texts: Texts
) -> TensorFile:
    open_file = _safetensors if config.layout == "fused" else _pickled
    return open_file(work, form, config, dtype, texts)


def _load_ours(kind: str) -> Callable[[Path, HybridConfig], CausalModel]:
    return lambda path, _: load_model(Source(str(path), path, kind), dtype=torch.float32)


TARGETS = {
    "transformers": Target(
        lambda origin, _: transformers_form(origin),
        _safetensors,
        lambda path, _: load_by_transformers(path),
    ),
    "gguf": Target(
        lambda origin, _: gguf_form(origin), _gguf, _load_ours("gguf"), (LINEAGE,), converts=True
    ),
    "mamba-ssm": Target(lambda origin, _: mamba_ssm_form(origin), _pickled, _load_ours("folder")),
    "mambainllama": Target(
        lambda origin, config: mambainllama_form(origin, config.layout == "fused"),
        _released,
        _load_ours("folder"),
    ),
}
