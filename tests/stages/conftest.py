"""A hybrid made from the tiny Llama, for the stages that measure."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def save_student(make_hybrid, tiny_llama_dir) -> Callable[[Path], Path]:
    """save_student(out): half of the layers are random Mamba-2, the rest is the teacher's."""

    def save(out: Path) -> Path:
        import torch

        from mambactl.checkpoint.load import load_model
        from mambactl.checkpoint.provenance import lineage
        from mambactl.checkpoint.reader import read_side_files
        from mambactl.checkpoint.save import save_model

        student = make_hybrid(["mamba2", "attention"] * 2, seed=2, tie_word_embeddings=True)
        shared = dict(load_model(str(tiny_llama_dir)).named_parameters())
        with torch.no_grad():
            for name, parameter in student.named_parameters():
                if name in shared:
                    parameter.copy_(shared[name])
                elif name.endswith("out_proj.weight"):
                    parameter.mul_(0.05)
        record = lineage("convert", None, tiny_llama_dir, str(tiny_llama_dir), {}, 0, {})
        return save_model(student, out, read_side_files(tiny_llama_dir), record)

    return save


@pytest.fixture(scope="session")
def permuted(tmp_path_factory, tiny_llama_dir) -> str:
    """The tiny Llama with two of its tokens exchanged."""
    folder = tmp_path_factory.mktemp("permuted") / "llama"
    shutil.copytree(tiny_llama_dir, folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text("utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary["the"], vocabulary["of"] = vocabulary["of"], vocabulary["the"]
    file.write_text(json.dumps(content), "utf-8")
    return str(folder)


@pytest.fixture(scope="session")
def save_llama(tmp_path_factory, tiny_tokenizer) -> Callable[..., str]:
    """save_llama(dtype, **config overrides) -> a folder with a random Llama of four layers."""

    import torch

    def save(dtype: torch.dtype = torch.float32, **overrides) -> str:
        from transformers import LlamaConfig, LlamaForCausalLM

        fields = {
            "vocab_size": 97, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "bos_token_id": 1,
            "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.2,
        }  # fmt: skip
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**{**fields, **overrides})).to(dtype)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.3)
        folder = tmp_path_factory.mktemp("source") / "llama"
        model.save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        return str(folder)

    return save
