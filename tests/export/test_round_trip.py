"""When an export counts as the same model as its original."""

import pytest
import torch

from mambactl.checkpoint.load import load_model, open_strict
from mambactl.checkpoint.resolve import resolve
from mambactl.errors import CheckError
from mambactl.export.exported_form import Origin
from mambactl.export.round_trip import Difference, compare


def compared(spec: str, change, rounded_to: str | None = None) -> Difference | None:
    """The comparison of a model with itself after `change(model)`."""

    def load():
        model = load_model(spec, dtype=torch.float32)
        with torch.no_grad():
            change(model)
        return model

    reader, adapted = open_strict(spec)
    with reader:
        return compare(Origin(spec, reader, adapted), resolve(spec), load, rounded_to)


def scaled(model, by: float) -> None:
    model.model.norm.weight.mul_(by)


def test_the_same_model_is_the_same(source) -> None:
    found = compared(source("native2"), lambda model: None)
    assert (found.prompts, found.logits, found.texts) == (4, 0, 0)
    assert found.tokens > 100 and found.scale > 1 and found.kl < 1e-6


@pytest.mark.parametrize("rounded_to", [None, "q8_0"])
def test_numbers_that_are_none_are_no_agreement(rounded_to, source) -> None:
    with pytest.raises(CheckError, match="nan"):
        compared(source("native2"), lambda model: scaled(model, float("nan")), rounded_to)


def test_a_rounding_has_a_limit_of_its_own(source) -> None:
    near = 1 + 1e-3
    with pytest.raises(CheckError, match="has logits that differ by"):
        compared(source("native2"), lambda model: scaled(model, near))
    found = compared(source("native2"), lambda model: scaled(model, near), "bfloat16")
    assert 0 < found.kl < 1e-3
    with pytest.raises(CheckError, match="nats per token from it, not 0.02"):
        compared(source("native2"), lambda model: scaled(model, 1.5), "q8_0")


def test_a_cache_that_is_wrong_shows_in_the_text(source) -> None:
    def forget(model) -> None:
        whole = model.generate

        # what follows a prompt is of another one
        def generate(ids, **options):
            made = whole(ids.flip(1), **options)
            return torch.cat([ids, made[:, ids.shape[1] :]], 1)

        model.generate = generate

    with pytest.raises(CheckError, match="continues 4 of 4 prompts in another way"):
        compared(source("native2"), forget)
