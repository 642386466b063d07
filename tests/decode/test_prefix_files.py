"""Files of `--prefix-cache`: the same tokens with and without, and nothing that does not fit."""

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from decode.beginnings import MODELS, SHARED, asked, tokens
from decode.engines import fused, noisy, plain
from safetensors import safe_open
from safetensors.torch import save_file

from mambactl.decode import prefix_files
from mambactl.decode.backend import make_engine
from mambactl.decode.gpu.prompt_graphs import GRAPH_TOKENS
from mambactl.decode.model_key import fingerprint, model_key
from mambactl.decode.prefill import prefill
from mambactl.decode.prefix_files import PrefixFolder
from mambactl.decode.sampler import SamplingParams
from mambactl.decode.shared_prefix import LEAST_SHARED, Prefixes

PARAMS = SamplingParams(max_new_tokens=6)
MOST = 10**9
PROMPT = asked([31])[0]
KEPT = len(PROMPT) - 1


@pytest.fixture
def folder(tmp_path) -> PrefixFolder:
    found = PrefixFolder(tmp_path / "kept", MOST)
    found.prepare()
    return found


@pytest.fixture(scope="module")
def model(make_hybrid):
    return make_hybrid(["attention", "mamba2_window"], seed=7)


@pytest.fixture(scope="module")
def other(make_hybrid):
    return make_hybrid(["mamba2"], seed=7)


@pytest.fixture(scope="module")
def expected(model) -> list[list[int]]:
    return plain(model).generate([PROMPT], PARAMS).tokens


def lengths(folder: PrefixFolder, model=None) -> list[int]:
    own = "*" if model is None else model_key(model.model)[:32]
    return sorted(int(path.name.split("-")[2]) for path in folder.path.glob(f"prefix-{own}-*"))


def tensors_of(cache) -> list[torch.Tensor]:
    for layer in cache.layers:
        layer.resize(cache.seen)
    return [tensor for layer in cache.layers for tensor in layer.tensors()]


@pytest.fixture(scope="module", params=MODELS)
def form(request) -> dict[str, object]:
    return MODELS[request.param]


@pytest.fixture(scope="module")
def each_form(form, make_hybrid):
    return make_hybrid(**form, seed=7)


@pytest.fixture(scope="module")
def near(form, make_hybrid):
    return noisy(make_hybrid(**form, seed=7), 0.02)


def test_a_file_gives_the_bits_that_reading_gives(each_form, folder) -> None:
    read = Prefixes(each_form.model, folder=folder).of([PROMPT])
    found = Prefixes(each_form.model, folder=folder)
    given = found.of([PROMPT])
    assert (found.from_files, read.seen, given.seen) == (KEPT, KEPT, KEPT)
    after = [
        prefill(each_form, [PROMPT, [*PROMPT, 5]], recording=True, prefix=cache)
        for cache in (read, given)
    ]
    assert torch.equal(after[0][1], after[1][1])
    for pair in ((read, given), (after[0][0], after[1][0])):
        for ours, theirs in zip(*map(tensors_of, pair), strict=True):
            assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype
    for one, two in zip(read.layers, given.layers, strict=True):
        assert getattr(two, "state", 0) is getattr(two, "live", 0)
        assert type(one) is type(two)


@pytest.mark.parametrize("make", [plain, fused])
@pytest.mark.parametrize("draft", [None, "ngram", "near"])
def test_tokens_are_the_same_with_and_without(each_form, near, make, draft, folder) -> None:
    """Processes with one prompt each: the second keeps what it shares with the first."""
    helper, k = (near if draft == "near" else draft), 0 if draft is None else 3
    prompts = asked([31, 70, 4])
    for which, given in ((0, 0), (1, 0), (2, SHARED), (0, KEPT), (1, len(prompts[1]) - 1)):
        prompt = prompts[which]
        wanted = plain(each_form).generate([prompt], PARAMS).tokens
        done = make(each_form, helper, k, folder).generate([prompt], PARAMS)
        assert done.tokens == wanted
        assert done.stats.prompt_from_files == done.stats.prompt_shared == given
    assert lengths(folder, each_form) == [SHARED, KEPT, len(prompts[1]) - 1]
    # the draft of the one engine reads its own: all but the token that its first pass reads
    reads = draft == "near" and make is fused
    assert lengths(folder, near) == ([SHARED, KEPT - 1, len(prompts[1]) - 2] if reads else [])


def test_what_is_kept(model, folder) -> None:
    """The whole of the first prompt; of later ones, and of a batch, what is shared."""
    engine, prompts = plain(model, folder=folder), asked([3, 90, 100, 110])
    whole = len(prompts[0]) - 1
    engine.generate(prompts[:1], PARAMS)
    assert lengths(folder) == [whole]
    for prompt in prompts[1:]:
        engine.generate([prompt], PARAMS)
    assert lengths(folder) == [SHARED, whole]
    # a pass of its own would cost more than reading less than 64 tokens again
    for prompt in (tokens(LEAST_SHARED, 1), *asked([40])):
        plain(model, folder=folder).generate([prompt], PARAMS)
    plain(model, folder=folder).generate(asked([0, 9], seed=1), PARAMS)
    assert lengths(folder) == [SHARED, SHARED, whole]


def test_a_batch_goes_on_from_what_all_its_rows_begin_with(model, folder) -> None:
    plain(model, folder=folder).generate([PROMPT[:-1]], PARAMS)
    rows = [PROMPT, [*PROMPT[:-1], 4, 4]]
    for make in (plain, fused):
        done = make(model, folder=folder).generate(rows, PARAMS)
        assert done.tokens == [plain(model).generate([row], PARAMS).tokens[0] for row in rows]
        assert done.stats.prompt_from_files == 2 * (KEPT - 1)


def test_a_file_stays_in_memory_for_later_calls(model, folder) -> None:
    plain(model, folder=folder).generate([PROMPT[: SHARED + 1]], PARAMS)
    engine = plain(model, folder=folder)
    for _ in range(2):
        assert engine.generate([PROMPT], PARAMS).stats.prompt_from_files == SHARED
        shutil.rmtree(folder.path, ignore_errors=True)


def content(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def rewritten(change, signed: bool):
    """Write the file again with other tensors, and if `signed` with the digest of those."""

    def damage(path: Path, _: Path) -> None:
        parts, header = content(path)
        parts = change({name: part.clone() for name, part in parts.items()})
        if signed:
            header["digest"] = fingerprint(parts.items())
        save_file(parts, path, header)

    return damage


def changed(name: str, change):
    return lambda parts: parts | {name: change(parts[name])}


def flipped(path: Path, _: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def first_off_by_one(ids: torch.Tensor) -> torch.Tensor:
    ids[0] += 1
    return ids


DAMAGE = {
    "truncated": (lambda path, _: os.truncate(path, 5000), "truncated"),
    "empty": (lambda path, _: path.write_bytes(b""), "truncated"),
    "another format": (lambda path, _: path.write_text("{}" * 1000), "safetensors"),
    "one bit": (flipped, "not what was written"),
    "nothing signed": (rewritten(lambda parts: parts, False), ""),
    "other numbers": (rewritten(changed("0.0", lambda t: t + 1), False), "not what was written"),
    "other tokens": (rewritten(changed("ids", first_off_by_one), True), "its tokens are others"),
    "fewer tokens": (rewritten(changed("ids", lambda t: t[1:].clone()), True), "not those of"),
    "another type": (rewritten(changed("0.0", torch.Tensor.double), True), "not those of"),
    "another shape": (rewritten(changed("0.0", lambda t: t.mT.contiguous()), True), "not those of"),
    "one too many": (rewritten(lambda parts: parts | {"9.9": torch.ones(1)}, True), "not those of"),
    "one too few": (
        rewritten(lambda parts: {k: v for k, v in parts.items() if k != "0.0"}, True),
        "not those of",
    ),
    "of another model": (lambda path, theirs: shutil.copy(theirs, path), "another model"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named_and_made_again(
    model, other, expected, folder, tmp_path, capfd, damage
) -> None:
    theirs = PrefixFolder(tmp_path / "theirs", MOST)
    theirs.prepare()
    for each, where in ((model, folder), (other, theirs)):
        plain(each, folder=where).generate([PROMPT], PARAMS)
    (path,), (foreign,) = (list(each.path.iterdir()) for each in (folder, theirs))
    change, sentence = DAMAGE[damage]
    change(path, foreign)
    capfd.readouterr()
    done = plain(model, folder=folder).generate([PROMPT], PARAMS)
    said = capfd.readouterr().err
    assert done.tokens == expected
    if not sentence:
        assert done.stats.prompt_from_files == KEPT and "warning" not in said
        return
    assert done.stats.prompt_from_files == 0
    assert said.count("warning: ") == 1 and str(path) in said and sentence in said
    assert plain(model, folder=folder).generate([PROMPT], PARAMS).stats.prompt_from_files == KEPT
    assert "warning" not in capfd.readouterr().err


def one_weight_less(model):
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0].mul_(1 + 2**-20)
    return model


OTHERWISE = {
    "weights": one_weight_less,
    "dtype": torch.nn.Module.double,
    "form": lambda model: setattr(model.config, "rms_norm_eps", 1e-4) or model,
}


@pytest.mark.parametrize("way", OTHERWISE)
def test_another_model_finds_nothing(way, make_hybrid, model, folder, capfd) -> None:
    changed = OTHERWISE[way](make_hybrid(["attention", "mamba2_window"], seed=7))
    for each in (model, changed):
        assert plain(each, folder=folder).generate([PROMPT], PARAMS).stats.prompt_from_files == 0
    assert lengths(folder) == [KEPT, KEPT] and "warning" not in capfd.readouterr().err
    # one that says the same elsewhere is the same
    same = make_hybrid(["attention", "mamba2_window"], seed=7)
    same.config._name_or_path = "elsewhere"
    assert model_key(same.model) == model_key(model.model)


def test_other_kernels_find_nothing(model, monkeypatch) -> None:
    before = model_key(model.model)
    monkeypatch.setattr("mambactl.decode.model_key.backends", lambda _: {"triton": None})
    assert model_key(model.model) != before


def test_files_of_others_stay(model, folder, capfd) -> None:
    """Files of other names stay, and links, folders and pipes of names that ours could have."""
    (folder.path / "thesis.safetensors").write_text("mine")
    plain(model, folder=folder).generate([PROMPT], PARAMS)
    (path,) = folder.path.glob("prefix-*")
    path.rename(folder.path / "kept")
    for make in (lambda: path.symlink_to("kept"), path.mkdir, lambda: os.mkfifo(path)):
        make()
        done = plain(model, folder=replace(folder, most=1)).generate([PROMPT], PARAMS)
        assert done.stats.prompt_from_files == 0 and os.path.lexists(path)
        path.rmdir() if path.is_dir() else path.unlink()
    assert sorted(each.name for each in folder.path.iterdir()) == ["kept", "thesis.safetensors"]
    assert "warning" not in capfd.readouterr().err


def test_the_folder_keeps_to_its_size(other, folder) -> None:
    """The files used longest ago go, and so do those that a killed process left."""
    prompts = [tokens(SHARED, seed) for seed in range(4)]
    plain(other, folder=folder).generate(prompts[:1], PARAMS)
    (path,) = folder.path.iterdir()
    size, left = path.stat().st_size, path.with_name(f"{path.name}.mambactl.partial")
    left.write_bytes(b"x")
    small = replace(folder, most=2 * size + size // 2)
    plain(other, folder=small).generate(prompts[1:2], PARAMS)
    assert len(lengths(folder)) == 2 and not left.exists()
    # used again, so that the second is the oldest
    plain(other, folder=small).generate(prompts[:1], PARAMS)
    plain(other, folder=small).generate(prompts[2:3], PARAMS)
    found = [
        plain(other, folder=small).generate([prompt], PARAMS).stats.prompt_from_files
        for prompt in (prompts[0], prompts[2], prompts[1])
    ]
    assert found == [SHARED - 1, SHARED - 1, 0]


def test_what_is_larger_than_the_bound_is_not_kept(other, folder, capfd) -> None:
    plain(other, folder=replace(folder, most=1000)).generate([PROMPT], PARAMS)
    assert list(folder.path.iterdir()) == []
    assert "more than --prefix-cache-gb" in capfd.readouterr().err


def test_a_folder_beyond_its_bound_says_so(folder, capfd) -> None:
    folder.prepare()
    folder.path.joinpath(f"prefix-{'0' * 32}-7-{'1' * 32}.safetensors").write_bytes(bytes(4096))
    folder.prepare()
    assert not capfd.readouterr().err
    PrefixFolder(folder.path, 4095).prepare()
    assert "more than the 4.1e-06 of --prefix-cache-gb" in " ".join(capfd.readouterr().err.split())


def test_a_disk_that_is_full_costs_one_warning(other, folder, monkeypatch, capfd) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    expected = plain(other).generate([PROMPT], PARAMS).tokens
    monkeypatch.setattr(prefix_files, "save_file", full)
    engine = plain(other, folder=folder)
    assert engine.generate([PROMPT], PARAMS).tokens == expected
    engine.generate(asked([0, 3], seed=4), PARAMS)
    said = capfd.readouterr().err
    assert said.count("warning") == said.count("No space left") == 1
    assert list(folder.path.iterdir()) == []


def test_processes_share_a_folder(other, folder, capfd) -> None:
    """Four write and read the same beginnings at once, within a size; one is killed in a write."""
    prompts = [tokens(SHARED, seed) for seed in range(6)]
    expected = [plain(other).generate([prompt], PARAMS).tokens for prompt in prompts]
    plain(other, folder=folder).generate(prompts[:1], PARAMS)
    (path,) = folder.path.iterdir()
    small = replace(folder, most=3 * path.stat().st_size)
    children = []
    for number in range(4):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                if number == 3:
                    prefix_files.save_file = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
                for turn in range(12):
                    which = (turn * (number + 1)) % 6
                    done = plain(other, folder=small).generate([prompts[which]], PARAMS)
                    assert done.tokens == expected[which]
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0, signal.SIGKILL]
    assert "warning" not in capfd.readouterr().err
    for prompt, wanted in zip(prompts, expected, strict=True):
        assert plain(other, folder=small).generate([prompt], PARAMS).tokens == wanted
    assert "warning" not in capfd.readouterr().err
    assert all(each.suffix == ".safetensors" for each in folder.path.iterdir())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompts_too_long_for_a_graph(form, dtype, make_hybrid, folder) -> None:
    """On a GPU the files give bits and tokens, too; shorter prompts need none."""
    model = make_hybrid(**form, seed=7).to("cuda", dtype)
    prompt = tokens(2 * GRAPH_TOKENS, 0)
    done = [make_engine(model, None, 0, folder=folder).generate([prompt], PARAMS) for _ in "ab"]
    assert done[0].tokens == done[1].tokens
    assert [each.stats.prompt_from_files for each in done] == [0, len(prompt) - 1]
    caches = [Prefixes(model.model, folder=each).of([prompt] * 2) for each in (None, folder)]
    for ours, theirs in zip(*map(tensors_of, caches), strict=True):
        assert torch.equal(ours, theirs) and ours.device == theirs.device
    engine = make_engine(model, None, 0, folder=folder)
    assert engine.generate([prompt[:500]], PARAMS).stats.prompt_from_files == 0
    assert lengths(folder) == [len(prompt) - 1]


def test_a_fingerprint_sees_every_bit() -> None:
    numbers = torch.randn(70, 1000, generator=torch.Generator().manual_seed(0))
    kinds = {torch.float32: torch.int32, torch.bfloat16: torch.float16,
             torch.float64: torch.int64, torch.int8: torch.uint8}  # fmt: skip
    for kind, other in kinds.items():
        given = numbers.to(kind)
        found = {fingerprint([("a", given)])}
        for at in (0, 16_383, 16_384, 69_999):
            bits = given.clone().view(-1).view(torch.uint8)
            bits[at * given.itemsize] ^= 0x80
            found.add(fingerprint([("a", bits.view(kind).view(70, 1000))]))
        found |= {fingerprint([("b", given)]), fingerprint([("a", given.view(1000, 70))])}
        found |= {fingerprint([("a", given.roll(1))]), fingerprint([("a", given.view(other))])}
        assert len(found) == 9
        assert fingerprint([("a", given.mT.contiguous().mT)]) == fingerprint([("a", given)])
