"""A saved model is read back bit for bit, and OUT is either absent or complete."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from mambactl.checkpoint import container
from mambactl.checkpoint.load import load_lineage, load_model, load_tokenizer, open_checkpoint
from mambactl.checkpoint.run_folder import RunFolder
from mambactl.checkpoint.save import CheckpointWriter, save_model
from mambactl.checkpoint.side_files import read_side_files
from mambactl.errors import OutputError, ResourceError
from mambactl.files import NAMED_TEMPLATES

SIDE_FILES = {"tokenizer.json": '{"model": "näïve \\" 🙂"}', "chat_template.jinja": "{{ x }}\n"}
LINEAGE = {"schema": 1, "stage": "convert", "source": "owner/model", "metrics": {"kl": 0.5}}
ONE = {"w": ((3, 5), torch.float32)}
WEIGHT = torch.arange(15.0).view(3, 5)


@pytest.fixture
def saved(mixed_model, tmp_path: Path) -> Path:
    """A sharded folder."""
    return save_model(mixed_model, tmp_path / "m", SIDE_FILES, LINEAGE, max_shard_bytes=30_000)


def same_state(left: torch.nn.Module, right: torch.nn.Module) -> None:
    a, b = left.state_dict(), right.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("out", ["folder", "one.st", "one.safetensors"])
@pytest.mark.parametrize("shard", [30_000, 5e9])
def test_round_trip_is_bit_exact(mixed_model, out: str, shard: float, tmp_path: Path) -> None:
    path = save_model(mixed_model, tmp_path / out, SIDE_FILES, LINEAGE, max_shard_bytes=shard)
    assert [entry.name for entry in tmp_path.iterdir()] == [out]
    same_state(mixed_model, load_model(str(path)))
    with open_checkpoint(str(path)) as reader:
        assert dict(reader.files) == SIDE_FILES
        assert reader.lineage == LINEAGE
        assert reader.dtype("model.layers.0.mamba.A_log") == torch.float32
    assert load_lineage(str(path)) == LINEAGE


def test_folder_to_file_to_folder(mixed_model, saved: Path, tmp_path: Path) -> None:
    """Copying between containers through the streaming interface loses nothing."""
    for source, target in [("m", "a.st"), ("a.st", "back")]:
        with open_checkpoint(str(tmp_path / source)) as reader:
            shapes = {name: (reader.shape(name), reader.dtype(name)) for name in reader.names()}
            out = tmp_path / target
            with CheckpointWriter(out, reader.config, reader.files, reader.lineage) as writer:
                writer.plan(shapes)
                # any order is allowed
                for name in reversed(shapes):
                    writer.write(name, reader.get(name))
    same_state(mixed_model, load_model(str(tmp_path / "back")))


def test_files_suit_other_tools(mixed_model, saved: Path, tmp_path: Path) -> None:
    assert len(list(saved.glob("model-*-of-*.safetensors"))) > 2
    for shard in saved.glob("*.safetensors"):
        with safe_open(shard, "pt") as handle:
            assert handle.metadata() == {"format": "pt"}
            for name in handle.keys():  # noqa: SIM118
                assert torch.equal(handle.get_tensor(name), mixed_model.state_dict()[name])
    assert AutoConfig.from_pretrained(saved).mixers == mixed_model.config.mixers
    same_state(mixed_model, AutoModelForCausalLM.from_pretrained(saved, dtype="auto"))
    assert (saved / "README.md").read_text().startswith("---\n")


def test_low_precision_state_space_parameters_are_widened(mixed_model, tmp_path: Path) -> None:
    loaded = load_model(str(save_model(mixed_model, tmp_path / "m", {}, None)), dtype=torch.float16)
    kinds = {name.rsplit(".", 1)[-1]: p.dtype for name, p in loaded.named_parameters()}
    assert kinds["A_log"] == kinds["D"] == kinds["dt_bias"] == torch.float32
    assert kinds["weight"] == torch.float16


def test_existing_output_is_kept_unless_forced(saved: Path, mixed_model) -> None:
    before = (saved / "mambactl.json").read_bytes()
    with pytest.raises(OutputError, match="exists") as caught:
        save_model(mixed_model, saved, {}, None)
    assert "--force" in caught.value.hint
    assert (saved / "mambactl.json").read_bytes() == before
    save_model(mixed_model, saved, {}, {**LINEAGE, "stage": "sft"}, force=True)
    assert load_lineage(str(saved))["stage"] == "sft"
    assert [entry.name for entry in saved.parent.iterdir()] == [saved.name]


def test_force_never_deletes_a_folder_of_something_else(mixed_model, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").touch()
    with pytest.raises(OutputError, match="other content"):
        save_model(mixed_model, tmp_path / "thesis", {}, None, force=True)
    assert (tmp_path / "thesis" / "chapter1.tex").exists()


@pytest.mark.parametrize("out", ["folder", "one.st"])
@pytest.mark.parametrize("kept", ["state.pt", "trainer/checkpoint-3/trainer_state.json"])
def test_state_of_a_training_run_is_not_overwritten(
    mixed_model, kept: str, out: str, tmp_path: Path
) -> None:
    run = RunFolder(tmp_path / out, {"stage": "distill"})
    state = run.path / kept
    with pytest.raises(RuntimeError, match="abrupt"), run.open(False, False):
        if kept == "state.pt":
            run.save_state({"step": 3})
        else:
            state.parent.mkdir(parents=True)
            state.touch()
        raise RuntimeError("abrupt")
    with pytest.raises(OutputError, match="unfinished run") as caught:
        save_model(mixed_model, tmp_path / out, {}, None)
    assert "--resume" in caught.value.hint
    assert state.exists()
    save_model(mixed_model, tmp_path / out, {}, None, force=True)
    assert [entry.name for entry in tmp_path.iterdir()] == [out]


@pytest.mark.parametrize("out", ["folder", "one.st"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_interrupted_write_leaves_nothing(out: str, error: type, tmp_path: Path) -> None:
    two = {**ONE, "v": ((2,), torch.int64)}
    with pytest.raises(error), CheckpointWriter(tmp_path / out, {}, {}, None) as writer:
        writer.plan(two)
        writer.write("w", WEIGHT)
        raise error
    assert list(tmp_path.iterdir()) == []


def test_failed_replacement_keeps_the_old_one(saved: Path, mixed_model) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        CheckpointWriter(saved, mixed_model.config, {}, None, force=True) as writer,
    ):
        writer.plan(ONE)
        raise KeyboardInterrupt
    same_state(mixed_model, load_model(str(saved)))


def test_forgotten_or_changed_tensors_are_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="never written"),
        CheckpointWriter(tmp_path / "m", {}, {}, None) as writer,
    ):
        writer.plan(ONE)
    with (
        pytest.raises(ValueError, match="planned as"),
        CheckpointWriter(tmp_path / "m", {}, {}, None) as writer,
    ):
        writer.plan(ONE)
        writer.write("w", WEIGHT.half())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("out", ["folder", "one.st"])
@pytest.mark.parametrize("force", [False, True])
def test_what_was_finished_while_another_waited_is_kept(
    out: str, force: bool, monkeypatch, tmp_path: Path
) -> None:
    """The second writer opens OUT.partial just before the first one renames it."""
    path = tmp_path / out
    first = CheckpointWriter(path, {}, {}, LINEAGE)
    first.__enter__()
    first.plan(ONE)
    first.write("w", WEIGHT)
    lock = fcntl.flock

    def finish_first(fd: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        first.__exit__(None, None, None)
        lock(fd, operation)

    second = CheckpointWriter(path, {}, {}, None, force)
    monkeypatch.setattr(fcntl, "flock", finish_first)
    if force:
        with second:
            second.plan(ONE)
            second.write("w", WEIGHT + 1)
    else:
        with pytest.raises(OutputError, match="exists"):
            second.__enter__()
    assert [entry.name for entry in tmp_path.iterdir()] == [out]
    with safe_open(path if path.is_file() else path / "model.safetensors", "pt") as handle:
        assert torch.equal(handle.get_tensor("w"), WEIGHT + force)


@pytest.mark.parametrize("out", ["folder", "one.st"])
def test_a_training_run_at_work_is_not_discarded(out: str, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / out, {"stage": "distill"})
    with run.open(False, False):
        run.save_state({"step": 3})
        with (
            pytest.raises(OutputError, match="another process is writing"),
            CheckpointWriter(run.out, {}, {}, None, force=True),
        ):
            pass
        assert run.load_state() == {"step": 3}


HANGING = """
import sys, time, torch
from pathlib import Path
from mambactl.checkpoint.save import CheckpointWriter
with CheckpointWriter(Path(sys.argv[1]), {}, {}, None) as writer:
    writer.plan({"w": ((3, 5), torch.float32), "v": ((3, 5), torch.float32)})
    writer.write("w", torch.zeros(3, 5))
    print("half", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("out", ["folder", "one.st"])
def test_kill_leaves_no_output_and_blocks_no_later_run(out: str, tmp_path: Path) -> None:
    path = tmp_path / out
    child = subprocess.Popen(
        [sys.executable, "-c", HANGING, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "half\n"
    with (
        pytest.raises(OutputError, match="another process"),
        CheckpointWriter(path, {}, {}, None),
    ):
        pass
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert not path.exists()
    with CheckpointWriter(path, {}, {}, None) as writer:
        writer.plan(ONE)
        writer.write("w", WEIGHT)
    assert [entry.name for entry in tmp_path.iterdir()] == [out]
    file = path if path.is_file() else path / "model.safetensors"
    with safe_open(file, "pt") as handle:
        assert torch.equal(handle.get_tensor("w"), WEIGHT)


def test_too_small_disk_is_noticed_before_writing(monkeypatch, tmp_path: Path) -> None:
    usage = container.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(container.shutil, "disk_usage", lambda _: usage._replace(free=10))
    with (
        pytest.raises(ResourceError, match="60.0 MiB, 0.0 MiB are free"),
        CheckpointWriter(tmp_path / "m", {}, {}, None) as writer,
    ):
        writer.plan({"w": ((60, 1 << 20), torch.int8)})
    assert list(tmp_path.iterdir()) == []


LIMITED = """
import resource, sys, torch
from pathlib import Path
from mambactl.checkpoint.save import CheckpointWriter
from mambactl.errors import ResourceError
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    with CheckpointWriter(Path(sys.argv[1]), {}, {}, None) as writer:
        writer.plan({"w": ((1 << 20,), torch.float32)})
        writer.write("w", torch.zeros(1 << 20))
except ResourceError as error:
    print(error)
"""


@pytest.mark.parametrize("out", ["folder", "one.st"])
def test_full_disk_is_a_sentence_and_leaves_nothing(out: str, tmp_path: Path) -> None:
    """The kernel refuses the write in the middle, as on a full disk."""
    command = [sys.executable, "-c", LIMITED, str(tmp_path / out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "disk is full" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_folder_is_a_sentence(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with (
        pytest.raises(OutputError, match="cannot write"),
        CheckpointWriter(tmp_path / "m", {}, {}, None),
    ):
        pass


COPY = """
import sys
from pathlib import Path
from mambactl.checkpoint.load import open_checkpoint
from mambactl.checkpoint.save import CheckpointWriter
def peak():
    # not ru_maxrss, which a child inherits from the process that started it
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])
base = peak()
source, out, shard = sys.argv[1:]
with open_checkpoint(source) as reader:
    shapes = {n: (reader.shape(n), reader.dtype(n)) for n in reader.names()}
    with CheckpointWriter(
        Path(out), reader.config, {}, None, max_shard_bytes=int(shard)
    ) as writer:
        writer.plan(shapes)
        for name in shapes:
            writer.write(name, reader.get(name))
print((peak() - base) * 1024)
"""
TENSOR_BYTES, TENSORS, SHARD_BYTES = 16 << 20, 40, 128 << 20


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's peak memory")
def test_memory_stays_at_a_fraction_of_the_model(tmp_path: Path) -> None:
    """640 MiB pass through with less than half of it resident: shards to shards, file to file."""
    shapes = {f"t{i}": ((TENSOR_BYTES // 2,), torch.bfloat16) for i in range(TENSORS)}
    bits = torch.randint(0, 1 << 15, (TENSOR_BYTES // 2,), dtype=torch.int16)
    for name, shard in [("big", SHARD_BYTES), ("big.st", SHARD_BYTES)]:
        with CheckpointWriter(tmp_path / name, {}, {}, None, max_shard_bytes=shard) as writer:
            writer.plan(shapes)
            for index, key in enumerate(shapes):
                writer.write(key, (bits + index).view(torch.bfloat16))
        copy = tmp_path / f"copy-{name}"
        command = [sys.executable, "-c", COPY, str(tmp_path / name), str(copy), str(shard)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        grown = int(done.stdout)
        assert TENSOR_BYTES < grown < SHARD_BYTES + (1 << 30), f"{grown >> 20} MiB"
        assert grown < TENSOR_BYTES * TENSORS / 2, f"{grown >> 20} MiB"
        with open_checkpoint(str(copy)) as reader:
            last = reader.get(f"t{TENSORS - 1}").view(torch.int16)
            assert torch.equal(last, bits + (TENSORS - 1))
        for file in [*tmp_path.rglob("*.safetensors"), *tmp_path.glob("*.st")]:
            file.unlink()


@pytest.mark.parametrize("name", ["out", "out.st"])
def test_chat_templates_beside_the_usual_one_are_kept_and_used(tiny_llama_dir, tmp_path, name):
    source = Path(shutil.copytree(tiny_llama_dir, tmp_path / "llama"))
    (source / NAMED_TEMPLATES).mkdir()
    (source / NAMED_TEMPLATES / "tool_use.jinja").write_text("tools {{ tools|tojson }}")
    # no name of a template
    (source / NAMED_TEMPLATES / "notes.txt").write_text("x")
    files = read_side_files(source)
    assert f"{NAMED_TEMPLATES}/tool_use.jinja" in files and len(files) == 1 + len(
        read_side_files(tiny_llama_dir)
    )
    out = save_model(load_model(str(source)), tmp_path / name, files, LINEAGE)
    tokenizer = load_tokenizer(str(out))
    assert set(tokenizer.chat_template) == {"default", "tool_use"}
    assert tokenizer.get_chat_template(None, []) == "tools {{ tools|tojson }}"
    # it is ours, and may be replaced
    save_model(load_model(str(source)), tmp_path / name, files, LINEAGE, force=True)
