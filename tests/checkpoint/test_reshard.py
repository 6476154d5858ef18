"""A state saved at one topology and read at any other, without processes: every rank is played in turn."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megabts.checkpoint import pieces as pieces_module
from megabts.checkpoint.folder import begin_folder, finish_folder, write_files
from megabts.checkpoint.manifest import MODEL_FILE, CheckpointError, content_hash, read_manifest, verify
from megabts.checkpoint.pieces import Piece, Placed, Region, TensorRecord, fragments_of, make_plan, offer
from megabts.checkpoint.reader import TensorReader, load_tensors
from megabts.config.model import ModelConfig
from megabts.model.decoder import Decoder
from megabts.model.torch_backend import TorchBackend
from megabts.parallel.mesh import Axis, ParallelMesh
from megabts.parallel.sharding import ParamMeta, check_fit, load_slices, named_metas

STATE_FILE = "optimizer.safetensors"
Metas = dict[str, ParamMeta]
Full = dict[str, Tensor]


@dataclass(frozen=True)
class Topology:
    """Degrees; `split` (pp or ep) shares the names out."""

    tp: int = 1
    dp: int = 1
    split: int = 1

    def ranks(self) -> Iterator["Rank"]:
        return (Rank(self, *place) for place in product(range(self.split), range(self.dp), range(self.tp)))


@dataclass(frozen=True)
class Rank:
    """One rank: what it holds of the weights, and of the optimizer's state as ZeRO shards it."""

    topology: Topology
    part: int
    dp: int
    tp: int

    @property
    def axis(self) -> Axis:
        return Axis("tp", self.topology.tp, self.tp)

    def names(self, metas: Metas) -> list[str]:
        names = list(metas)
        bounds = [len(names) * i // self.topology.split for i in range(self.topology.split + 1)]
        return names[bounds[self.part] : bounds[self.part + 1]]

    def flats(self, metas: Metas) -> dict[str, tuple[int, int]]:
        """The intervals of its parameters that lie in its share of one flat buffer of all of them."""
        sizes = {
            name: metas[name].shard(torch.empty(metas[name].shape), self.axis).numel() for name in self.names(metas)
        }
        share = -(-sum(sizes.values()) // self.topology.dp)
        found, start = {}, 0
        for name, size in sizes.items():
            first, last = (min(max(share * r - start, 0), size) for r in (self.dp, self.dp + 1))
            found[name] = (first, last)
            start += size
        return found

    def pieces(self, metas: Metas, full: Full, state: Full) -> dict[str, list[Piece]]:
        weights = [Piece(n, metas[n], self.axis, metas[n].shard(full[n], self.axis)) for n in self.names(metas)]
        shards = []
        for name, (first, last) in self.flats(metas).items():
            local = metas[name].shard(state[name], self.axis).reshape(-1)[first:last]
            shards.append(Piece(name, metas[name], self.axis, local, (first, last)))
        return {MODEL_FILE: weights, STATE_FILE: shards}


def write(folder: Path, topology: Topology, metas: Metas, full: Full, state: Full) -> Path:
    """A checkpoint of all ranks of a topology."""
    held = [rank.pieces(metas, full, state) for rank in topology.ranks()]
    fragments = [
        {name: [one for piece in mine for one in fragments_of(piece)] for name, mine in ranked.items()}
        for ranked in held
    ]
    offers = [offer(mine) for mine in fragments]
    begin_folder(folder, [], 0)
    records: dict[str, Any] = {}
    for number, mine in enumerate(fragments):
        plan = make_plan(offers, number)
        records |= write_files(folder, plan.tensors(mine), {}, 0)
    finish_folder(folder, records, make_plan(offers, 0).tables, {}, [])
    return folder


def assert_reads(folder: Path, topology: Topology, metas: Metas, full: Full, state: Full) -> None:
    """Every rank of the topology reads what it would hold, bit for bit."""
    with TensorReader(folder, MODEL_FILE) as weights, TensorReader(folder, STATE_FILE) as shards:
        assert weights.shapes == shards.shapes == {name: meta.shape for name, meta in metas.items()}
        for rank in topology.ranks():
            flats = rank.flats(metas)
            for name in rank.names(metas):
                meta = metas[name]
                local = weights.read_slice(name, meta, rank.axis)
                assert torch.equal(local, meta.shard(full[name], rank.axis)), name
                assert local.dtype == full[name].dtype
                first, last = flats[name]
                if first < last:
                    read = shards.read_slice(name, meta, rank.axis, (first, last))
                    assert torch.equal(read, meta.shard(state[name], rank.axis).reshape(-1)[first:last]), (rank, name)


def random_state(**sizes: Any) -> tuple[Metas, Full, Full]:
    """Metas of a decoder with a vocabulary that divides by nothing, random weights in bfloat16, and a float32 state."""
    config = ModelConfig(
        **{
            **{"hidden_size": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "ffn_size": 24, "vocab_size": 31},
            **sizes,
        }
    )
    model = Decoder(config, TorchBackend(torch.float32, "meta", ParallelMesh().tp))
    metas = {name: meta for name, _, meta in named_metas(model)}
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(meta.shape, generator=generator) for name, meta in metas.items()}
    return metas, {name: tensor.bfloat16() for name, tensor in state.items()}, state


TOPOLOGIES = {
    "one": Topology(),
    "tp2": Topology(tp=2),
    "tp4": Topology(tp=4),
    "pp2": Topology(split=2),
    "dp2": Topology(dp=2),
    "dp3": Topology(dp=3),
    "tp2 dp2": Topology(tp=2, dp=2),
    "tp4 dp3": Topology(tp=4, dp=3),
    "tp2 pp2 dp2": Topology(tp=2, split=2, dp=2),
}
MODELS: dict[str, dict[str, Any]] = {
    "grouped heads": {},  # 2 heads of keys: held twice each at tp 4
    "one head of keys, bias": {"num_kv_heads": 1, "qkv_bias": True, "qk_norm": True},
    "tied": {"tie_embeddings": True, "num_kv_heads": 4},
}


@pytest.mark.parametrize("model", MODELS)
def test_every_topology_reads_every_other(model: str, tmp_path: Path) -> None:
    metas, full, state = random_state(**MODELS[model])
    for name, writer in TOPOLOGIES.items():
        folder = write(tmp_path / name, writer, metas, full, state)
        verify(folder)
        for reader in TOPOLOGIES.values():
            assert_reads(folder, reader, metas, full, state)
        for file, values in ((MODEL_FILE, full), (STATE_FILE, state)):
            read = load_tensors(folder, file)
            assert read.keys() == values.keys()
            assert all(torch.equal(tensor, values[key]) for key, tensor in read.items())


def test_every_element_is_stored_once(tmp_path: Path) -> None:
    """The files of any topology hold as many elements as the one file of one rank."""
    metas, full, state = random_state(num_kv_heads=1, qkv_bias=True)
    count = sum(tensor.numel() for tensor in full.values())
    for name, topology in TOPOLOGIES.items():
        folder = write(tmp_path / name, topology, metas, full, state)
        for stem, width in (("model", 2), ("optimizer", 4)):
            stored = 0
            for path in folder.glob(f"{stem}*.safetensors"):
                data = path.read_bytes()
                stored += len(data) - 8 - int.from_bytes(data[:8], "little")
            assert stored == count * width, (name, stem)


def test_one_rank_writes_files_of_full_tensors_in_the_first_format(tmp_path: Path) -> None:
    metas, full, state = random_state()
    folder = write(tmp_path / "c", Topology(), metas, full, state)
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", MODEL_FILE, STATE_FILE]
    assert json.loads((folder / "manifest.json").read_text())["format"] == 1
    assert read_manifest(folder).tensors == {}
    folder = write(tmp_path / "d", Topology(dp=2), metas, full, state)
    names = ["manifest.json", MODEL_FILE, "optimizer-00000.safetensors", "optimizer-00001.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert content_hash(folder) == content_hash(tmp_path / "c")
    assert content_hash(write(tmp_path / "e", Topology(tp=2), metas, full, state)) != content_hash(folder)


def test_a_rank_of_the_same_place_touches_its_own_files_alone(tmp_path: Path) -> None:
    metas, full, state = random_state(num_kv_heads=4)
    topology = Topology(tp=2, dp=2)
    folder = write(tmp_path / "c", topology, metas, full, state)
    split = {name: meta for name, meta in metas.items() if meta.dim is not None}
    rank = list(topology.ranks())[3]
    for number in (0, 1, 2):
        (folder / f"optimizer-{number:05d}.safetensors").unlink()
    (folder / "model-00000.safetensors").unlink()
    with TensorReader(folder, MODEL_FILE) as weights, TensorReader(folder, STATE_FILE) as shards:
        for name, (first, last) in rank.flats(metas).items():
            if name in split:
                weights.read_slice(name, metas[name], rank.axis)
                if first < last:
                    shards.read_slice(name, metas[name], rank.axis, (first, last))
        with pytest.raises(CheckpointError, match=r"damaged: model-00000\.safetensors"):
            weights.read("head.weight")


def test_a_part_of_a_model_is_loaded_and_the_whole_is_checked(tmp_path: Path) -> None:
    metas, full, state = random_state()
    folder = write(tmp_path / "c", Topology(tp=2), metas, full, state)
    mesh = ParallelMesh(tp=Axis("tp", 4, 3))
    mine = [(name, torch.nn.Parameter(torch.zeros(m.local_shape(mesh.tp))), m) for name, m in list(metas.items())[3:7]]
    whole = {name: meta.shape for name, meta in metas.items()}
    with TensorReader(folder, MODEL_FILE) as reader:
        check_fit(reader.shapes, whole, "DIR")
        load_slices(mine, reader, mesh)
        for name, parameter, meta in mine:
            assert torch.equal(parameter, meta.shard(full[name], mesh.tp).float())
        cases = {
            "DIR does not fit the model: it has head.weight, which the model lacks": {
                name: shape for name, shape in whole.items() if name != "head.weight"
            },
            r"DIR does not fit the model: it lacks more \(1 such\)": {**whole, "more": (1,)},
            r"DIR: head.weight has shape \(31, 16\), the model \(32, 16\)": {**whole, "head.weight": (32, 16)},
        }
        for message, expected in cases.items():
            with pytest.raises(Exception, match=message):
                check_fit(reader.shapes, expected, "DIR")


def placed(*regions: Region) -> TensorRecord:
    return TensorRecord((4, 3), tuple(Placed("f", "w", region) for region in regions))


@pytest.mark.parametrize(
    "record, message",
    [
        (placed(), "0 of 12"),
        (placed(Region(0, ((0, 2),))), "6 of 12"),
        (placed(Region(), Region(0, ((0, 2),))), "18 of 12"),
        (placed(Region(0, ((2, 5),))), "outside"),
        (placed(Region(2, ((0, 2),))), "outside"),
        (placed(Region(0, ((2, 2),))), "outside"),
        (placed(Region(0, ((0, 4),), (0, 13))), "outside"),
        (placed(Region(0, (), (5, 2))), "outside"),
    ],
)
def test_pieces_that_make_no_tensor_are_refused(record: TensorRecord, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TensorRecord.from_json("w", json.loads(json.dumps(record.to_json("w"))))


def test_ranks_that_do_not_make_up_a_tensor_are_refused() -> None:
    meta = ParamMeta((4, 3), dim=0)
    half = Piece("w", meta, Axis("tp", 2, 0), torch.zeros(2, 3))
    offers = [offer({"m.safetensors": fragments_of(half)})] * 2
    with pytest.raises(ValueError, match="w: its pieces hold 6 of 12 elements"):
        make_plan(offers, 0)
    assert pieces_module.region_of(meta, Axis("tp", 1, 0), (0, 12)) == Region()
