"""A teacher and a text for the choice of what keeps attention."""

import pytest
from conftest import write_sentences


@pytest.fixture(scope="module")
def llama(tiny_llama_dir) -> str:
    return str(tiny_llama_dir)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    return write_sentences(tmp_path_factory.mktemp("text") / "fit.jsonl", 0, 60)
