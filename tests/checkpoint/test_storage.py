"""Checkpoint folders and run folders: what is written is what is read, by us and by the safetensors library."""

import json
import logging
import os
import pickletools
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from megabts.checkpoint import storage
from megabts.checkpoint.folder import space_needed, write_checkpoint
from megabts.checkpoint.manifest import (
    CheckpointError,
    MemberRecord,
    check_member,
    content_hash,
    read_manifest,
    verify,
    write_manifest,
)
from megabts.checkpoint.pieces import Placed, Region, TensorRecord
from megabts.checkpoint.reader import load_tensors
from megabts.checkpoint.safetensors_writer import DTYPE_CODES, serialize, serialized_size, tensors_hash
from megabts.errors import UserError
from tests.checkpoint.saves import save_step


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert {name: bits(t) for name, t in left.items()} == {name: bits(t) for name, t in right.items()}


def every_kind() -> dict[str, torch.Tensor]:
    """All types, and the shapes and layouts that go wrong: scalars, empty, transposed, expanded, shared, parameters."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for dtype, code in DTYPE_CODES.items():
        raw = torch.randint(0, 256, (3, 5, dtype.itemsize), generator=generator, dtype=torch.uint8)
        tensors[f"type.{code}"] = (raw % 2).bool()[..., 0] if dtype == torch.bool else raw.view(dtype)[..., 0]
    weight = torch.randn(4, 6, generator=generator)
    return tensors | {
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.zeros(0, 7, dtype=torch.bfloat16),
        "transposed": weight.t(),
        "expanded": weight[:1].expand(3, 6),
        "shared.a": weight,
        "shared.b": weight,
        "view": weight[1:3, ::2],
        "parameter": torch.nn.Parameter(weight.clone()),
        'nän with "quotes"': torch.tensor([float("nan"), float("inf"), -0.0]),
    }


def save(run: Path, step: int, **options: Any) -> Path:
    tensors = {"w": torch.full((3, 4), float(step)), "b": torch.arange(step % 7 + 1)}
    files = {"model.safetensors": tensors, "optimizer.safetensors": {"m": torch.full((5,), -float(step))}}
    return save_step(run, step, files, {"config.yaml": b"a: 1\n"}, {"consumed_samples": 8 * step}, **options)


def test_every_kind_reads_back_equal_by_us_and_by_the_library(tmp_path: Path) -> None:
    tensors = every_kind()
    folder = tmp_path / "one"
    write_checkpoint(folder, {"model.safetensors": tensors}, {}, {})
    assert_same(load_tensors(folder, "model.safetensors"), tensors)
    assert_same(safetensors.torch.load_file(folder / "model.safetensors"), tensors)
    with safetensors.safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_reads_what_the_library_wrote(tmp_path: Path) -> None:
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in every_kind().items()}
    safetensors.torch.save_file(tensors, tmp_path / "theirs.safetensors")
    blobs = {"model.safetensors": (tmp_path / "theirs.safetensors").read_bytes()}
    write_checkpoint(tmp_path / "c", {}, blobs, {})
    assert_same(load_tensors(tmp_path / "c", "model.safetensors"), tensors)


def test_tensors_start_at_multiples_of_their_element_size_and_size_is_known_before(tmp_path: Path) -> None:
    data = b"".join(serialize(every_kind()))
    assert len(data) == serialized_size(every_kind())
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__")
    widths = {code: dtype.itemsize for dtype, code in DTYPE_CODES.items()}
    assert length % 8 == 0
    assert [e["data_offsets"][0] % widths[e["dtype"]] for e in header.values()] == [0] * len(header)


def test_big_tensors_cross_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megabts.checkpoint.safetensors_writer.CHUNK_BYTES", 64)
    monkeypatch.setattr("megabts.checkpoint.durable.CHUNK_BYTES", 50)
    write_checkpoint(tmp_path / "c", {"model.safetensors": every_kind()}, {}, {})
    verify(tmp_path / "c")
    assert_same(load_tensors(tmp_path / "c", "model.safetensors"), every_kind())


@pytest.mark.parametrize(
    "tensor", [torch.zeros(2, dtype=torch.complex64), torch.zeros(2, device="meta"), torch.eye(2).to_sparse()]
)
def test_tensors_the_format_cannot_hold_are_refused_by_name(tmp_path: Path, tensor: torch.Tensor) -> None:
    with pytest.raises(UserError, match="'bad'"):
        write_checkpoint(tmp_path / "c", {"model.safetensors": {"bad": tensor}}, {}, {})
    assert list(tmp_path.iterdir()) == []


def test_loaded_tensors_are_the_callers_own(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    loaded = load_tensors(folder, "model.safetensors")
    loaded["w"].add_(1)
    verify(folder)


def test_a_file_that_was_not_saved(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    with pytest.raises(CheckpointError, match=r"without rng\.safetensors"):
        load_tensors(folder, "rng.safetensors")


def test_tensors_hash_is_the_hash_of_the_file_and_sees_every_difference(tmp_path: Path) -> None:
    base = {"a": torch.zeros(2, 3), "b": torch.ones(2)}
    write_checkpoint(tmp_path / "c", {"model.safetensors": base}, {}, {})
    recorded = read_manifest(tmp_path / "c").files["model.safetensors"].sha256
    assert tensors_hash(dict(reversed(base.items()))) == recorded
    others = [
        {"a": torch.zeros(3, 2), "b": torch.ones(2)},
        {"a": torch.zeros(2, 3), "c": torch.ones(2)},
        {"a": torch.zeros(2, 3), "b": torch.ones(2, dtype=torch.float64)},
        {"a": torch.zeros(2, 3), "b": torch.tensor([1.0, 1.0000001])},
    ]
    assert len({recorded, *map(tensors_hash, others)}) == 5


def test_manifest_holds_state_and_files(tmp_path: Path) -> None:
    state: dict[Any, Any] = {"loss": 0.1 + 0.2, "spike": float("inf"), "tiny": 1e-300, "names": ["ä"], 7: 8}
    blobs = {"config.yaml": "ü: 1\n".encode(), "tokenizer/deep/tokenizer.json": b"{}"}
    write_checkpoint(tmp_path / "c", {}, blobs, state)
    manifest = verify(tmp_path / "c")
    assert manifest.state == {**{k: v for k, v in state.items() if k != 7}, "7": 8}
    assert manifest.files.keys() == {"config.yaml", "tokenizer/deep/tokenizer.json"}
    assert (tmp_path / "c/tokenizer/deep/tokenizer.json").read_text() == "{}"
    assert (tmp_path / "c/config.yaml").read_text(encoding="utf-8") == "ü: 1\n"


def test_bad_requests_leave_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for name in ("manifest.json", "../x", "/x", ""):
        with pytest.raises(CheckpointError, match="cannot be a file"):
            save_step(run, 1, {}, {name: b""}, {})
    with pytest.raises(CheckpointError, match="not plain JSON"):
        save_step(run, 1, {}, {}, {"x": torch.zeros(1)})
    with pytest.raises(UserError, match="keep_last is 0"):
        save(run, 1, keep_last=0)
    assert list(run.iterdir()) == []
    assert not storage.has_steps(run)


def test_run_folder_where_no_folder_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"step_00000001 not saved: .*check the path"):
        save(tmp_path / "file" / "run", 1)


def test_files_hold_no_pickle(tmp_path: Path) -> None:
    for path in save(tmp_path, 1).iterdir():
        with pytest.raises(ValueError):
            list(pickletools.genops(path.read_bytes()))


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        events.append(("sync", os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path)))
        fsync(descriptor)

    def named(source: Path, target: Path) -> None:
        events.append(("name", target.name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", named)
    monkeypatch.setattr(os, "replace", named)
    save_step(tmp_path, 1, {"m.safetensors": {"w": torch.ones(1)}}, {"tok/t.json": b"x"}, {})
    aside = ".step_00000001.tmp"
    files = [f"{aside}/{name}" for name in ("m.safetensors", "tok/t.json", "manifest.json")]
    assert [path for _, path in events[:3]] == files
    assert sorted(events[3:5]) == [("sync", aside), ("sync", f"{aside}/tok")]
    rest = [("name", "step_00000001"), ("sync", "."), ("sync", ".latest.tmp"), ("name", "latest"), ("sync", ".")]
    assert events[5:] == rest


def test_latest_and_retention(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step, keep_last=2)
        assert storage.resolve(tmp_path) == tmp_path / f"step_{step:08d}"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000020", "step_00000030"]
    assert (tmp_path / "latest").read_text() == "step_00000030\n"
    state = read_manifest(storage.resolve(tmp_path)).state
    assert state == {"step": 30, "consumed_samples": 240}


def test_a_run_set_back_keeps_the_steps_beyond(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step)
    (tmp_path / "latest").write_text("step_00000010")
    assert storage.resolve(tmp_path).name == "step_00000010"
    save(tmp_path, 15, keep_last=1)
    names = sorted(p.name for p in tmp_path.glob("step_*"))
    assert names == ["step_00000015", "step_00000020", "step_00000030"]
    assert storage.resolve(tmp_path).name == "step_00000015"


def test_nothing_is_deleted_when_the_new_step_reads_back_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 10)
    replace_text = storage.replace_text

    def damaging(path: Path, text: str) -> None:
        replace_text(path, text)
        with open(tmp_path / "step_00000020" / "model.safetensors", "r+b") as file:
            file.write(b"\xff")

    monkeypatch.setattr(storage, "replace_text", damaging)
    with pytest.raises(CheckpointError, match=r"step_00000020 is damaged: model\.safetensors"):
        save(tmp_path, 20, keep_last=1)
    assert storage.resolve(tmp_path).name == "step_00000010"


def test_leftovers_are_removed_with_a_notice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 10)
    for name in (".step_00000020.tmp", ".step_00000005.trash", ".step_00000010.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("x")
    (tmp_path / ".latest.tmp").write_text("x")
    (tmp_path / "notes.tmp").write_text("the user's own")
    with caplog.at_level(logging.WARNING):
        save(tmp_path, 20)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "notes.tmp", "step_00000010", "step_00000020"]
    assert len([r for r in caplog.records if "left by an interrupted save" in r.getMessage()]) == 4


def test_resolve_takes_checkpoint_folders_too(tmp_path: Path) -> None:
    folder = save(tmp_path, 10)
    assert storage.resolve(folder) == folder
    write_checkpoint(tmp_path / "other", {}, {}, {})
    assert storage.resolve(tmp_path / "other") == tmp_path / "other"
    (folder / "config.yaml").write_text("a: 2\n")
    with pytest.raises(CheckpointError, match=r"config\.yaml"):
        storage.resolve(folder)


def test_nothing_usable_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no usable checkpoint"):
        storage.resolve(tmp_path / "absent")
    with pytest.raises(UserError, match="no usable checkpoint"):
        storage.resolve(tmp_path)
    (save(tmp_path, 10) / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"no usable checkpoint.*step_00000010 is damaged: manifest\.json"):
        storage.resolve(tmp_path)
    assert storage.has_steps(tmp_path)


def test_a_newer_format_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("megabts.checkpoint.manifest.FORMAT", 3)
        tables = {"m.safetensors": {"w": TensorRecord((1,), (Placed("m-00001.safetensors", "w", Region()),))}}
        write_manifest(tmp_path, tmp_path, {}, {}, [], tables)
    with pytest.raises(CheckpointError, match="format 3, this megabts reads 1 to 2"):
        read_manifest(tmp_path)


def stitched(tmp_path: Path) -> tuple[Path, Path, Path]:
    near, far = save(tmp_path / "runs/code", 5), save(tmp_path / "elsewhere", 5)
    members = [MemberRecord(p.parent.name, str(p), content_hash(p)) for p in (near, far)]
    return save(tmp_path / "runs/stitch", 7, members=members), near, far


def test_members_are_found_and_checked(tmp_path: Path) -> None:
    folder, near, far = stitched(tmp_path)
    raw = json.loads((folder / "manifest.json").read_text())["members"]
    assert [m["path"] for m in raw] == ["../../code/step_00000005", str(far)]
    members = read_manifest(folder).members
    assert [check_member(m, folder) for m in members] == [near, far]
    save(near.parent, 5)
    assert check_member(members[0], folder) == near
    write_checkpoint(near, {"model.safetensors": {"w": torch.ones(1)}}, {}, {})
    with pytest.raises(CheckpointError, match=r"member 'code' .* has changed"):
        check_member(members[0], folder)
    far.rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"member 'elsewhere' .* not at .* any more"):
        check_member(members[1], folder)


def test_the_tree_of_runs_can_move(tmp_path: Path) -> None:
    folder, _, _ = stitched(tmp_path)
    before = content_hash(folder)
    (tmp_path / "runs").rename(tmp_path / "archive")
    moved = tmp_path / "archive/stitch" / folder.name
    member = read_manifest(moved).members[0]
    assert check_member(member, moved) == tmp_path / "archive/code/step_00000005"
    assert content_hash(moved) == before


def test_content_hash_follows_weights_and_members_only(tmp_path: Path) -> None:
    folder, near, _ = stitched(tmp_path)
    assert content_hash(near) != content_hash(folder)
    tensors = load_tensors(near, "model.safetensors")
    write_checkpoint(tmp_path / "same", {"model.safetensors": tensors}, {"config.yaml": b"b: 1\n"}, {"step": 9})
    assert content_hash(tmp_path / "same") == content_hash(near)
    write_checkpoint(tmp_path / "none", {}, {}, {})
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        content_hash(tmp_path / "none")


def test_the_space_estimate_covers_what_is_written(tmp_path: Path) -> None:
    files, blobs = {"model.safetensors": every_kind()}, {"config.yaml": b"x" * 999}
    write_checkpoint(tmp_path / "c", files, blobs, {})
    written = sum(path.stat().st_size for path in (tmp_path / "c").iterdir())
    assert written <= space_needed(files, blobs) <= written + (1 << 16)
