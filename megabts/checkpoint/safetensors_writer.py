"""Named tensors as one safetensors byte stream, piece by piece.

Format: 8 bytes little-endian header length, a JSON header padded with spaces to a multiple of 8, then the raw
little-endian bytes of every tensor without gaps. The library's own `save_file` wants all tensors contiguous, refuses
shared memory and gives no bytes to hash; this writer copies one tensor at a time (to the CPU, contiguous), so saving
needs the memory of the largest tensor, not of the model. Tensors that share memory are written once per name.
Limit: written as they lie in memory, so only on little-endian machines; no sparse, quantized or meta tensors.
"""

import json
import sys
from collections.abc import Iterator, Mapping

import torch

from megabts.checkpoint.durable import CHUNK_BYTES, hash_chunks
from megabts.errors import UserError

DTYPE_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
METADATA_KEY = "__metadata__"


def serialize(tensors: Mapping[str, torch.Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file holding `tensors`, in pieces of at most `CHUNK_BYTES`.

    The order of the tensors in the file depends on names and types alone, so equal contents give equal bytes.
    Raises UserError for a tensor the format cannot hold.
    """
    assert sys.byteorder == "little", "tensor bytes are written as they lie in memory"
    order = _file_order(tensors)
    yield _header(tensors, order)
    for name in order:
        flat = tensors[name].detach().to("cpu").reshape(-1).contiguous()
        data = flat.view(torch.uint8).numpy().data
        for start in range(0, len(data), CHUNK_BYTES):
            yield data[start : start + CHUNK_BYTES]


def serialized_size(tensors: Mapping[str, torch.Tensor]) -> int:
    """Bytes of the file `serialize` makes, without making it."""
    return len(_header(tensors, _file_order(tensors))) + sum(tensor.nbytes for tensor in tensors.values())


def tensors_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 over names, types, shapes and values; equal to the hash of the file these tensors are written to."""
    return hash_chunks(serialize(tensors))


def _file_order(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Wide types first: every tensor then starts at a multiple of its element size."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def _header(tensors: Mapping[str, torch.Tensor], order: list[str]) -> bytes:
    entries: dict[str, object] = {METADATA_KEY: {"format": "pt"}}
    offset = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in DTYPE_CODES or tensor.layout != torch.strided or tensor.is_meta or name == METADATA_KEY:
            kind = "meta" if tensor.is_meta else f"{tensor.dtype}, {tensor.layout}"
            raise UserError(f"tensor '{name}' ({kind}) cannot be stored in a safetensors file; convert or rename it")
        end = offset + tensor.nbytes
        entries[name] = {"dtype": DTYPE_CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
