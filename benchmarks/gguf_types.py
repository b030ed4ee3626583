"""GGUF's kinds of quantisation, by llama.cpp's own code: of arrays, and of a whole file.

Python's gguf reads them all and writes few; llama.cpp's library, which xllamacpp brings along, writes the others.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import numpy as np
import torch
import xllamacpp
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, Keys, LlamaFileType
from gguf.quants import dequantize
from torch import nn

Kind = GGMLQuantizationType
FALLBACK = {Kind.Q3_K: Kind.IQ4_NL, Kind.Q4_K: Kind.Q5_0, Kind.Q5_K: Kind.Q5_1, Kind.Q6_K: Kind.Q8_0}
"""What llama.cpp takes where rows are no whole number of a kind's blocks of 256."""
FILE_TYPES = {
    "F16": LlamaFileType.MOSTLY_F16,
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
    "Q6_K": LlamaFileType.MOSTLY_Q6_K,
    "Q4_K": LlamaFileType.MOSTLY_Q4_K_S,
    "Q3_K": LlamaFileType.MOSTLY_Q3_K_S,
}
EMBEDDING = "token_embd.weight"
"""The output too, where both are one; llama.cpp gives it Q6_K whatever the others get, which is its fallback here."""


@cache
def _library() -> ctypes.CDLL:
    (path,) = Path(xllamacpp.__file__).parent.glob("xllamacpp*.so")
    library = ctypes.CDLL(str(path))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library


def kind_of(columns: int, wanted: Kind) -> Kind:
    """What rows of so many numbers are stored as."""
    for kind in (wanted, FALLBACK.get(wanted, Kind.F16), Kind.F16):
        if columns % GGML_QUANT_SIZES[kind][0] == 0:
            return kind
    raise AssertionError(columns)


def quantized(rows: np.ndarray, kind: Kind) -> np.ndarray:
    """Float32 [rows, columns] as llama.cpp stores them, uint8 [rows, bytes]."""
    if kind in (Kind.F16, Kind.F32):
        return rows.astype(np.float16 if kind == Kind.F16 else np.float32)
    block, size = GGML_QUANT_SIZES[kind]
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    count, columns = rows.shape
    made = np.empty((count, columns // block * size), dtype=np.uint8)
    source, target = (each.ctypes.data_as(ctypes.c_void_p) for each in (rows, made))
    sizes = (ctypes.c_int64(number) for number in (0, count, columns))
    written = _library().ggml_quantize_chunk(ctypes.c_int(kind), source, target, *sizes, None)
    assert written == made.nbytes, (written, made.nbytes)
    return made


def wanted_for(name: str, kind: Kind) -> Kind:
    """The embedding keeps more than the other matrices."""
    return Kind.Q6_K if name == EMBEDDING and kind in (Kind.Q3_K, Kind.Q4_K) else kind


def rewrite(source: Path, target: Path, name: str) -> None:
    """The same GGUF file in another kind: its matrices, while vectors stay as they are.

    Args:
        source: a file of float16 or float32.
        target: to write.
        name: of `FILE_TYPES`.
    """
    reader = GGUFReader(source)
    writer = GGUFWriter(target, str(reader.fields[Keys.General.ARCHITECTURE].contents()))
    for field in reader.fields.values():
        known = field.name.startswith("GGUF.") or field.name in (Keys.General.ARCHITECTURE, Keys.General.FILE_TYPE)
        if not known:
            inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    writer.add_file_type(FILE_TYPES[name])
    for tensor in reader.tensors:
        rows = dequantize(tensor.data, tensor.tensor_type)
        kind = tensor.tensor_type
        if rows.ndim > 1:
            kind = kind_of(rows.shape[-1], wanted_for(tensor.name, Kind[name]))
        writer.add_tensor(tensor.name, quantized(rows, kind) if rows.ndim > 1 else rows, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def as_stored(model: nn.Module, name: str) -> None:
    """Give a model's matrices the values that a file of a kind holds; llama.cpp rounds activations besides."""
    kind = Kind[name]
    weights = {id(each.weight): each.weight for each in model.modules() if isinstance(each, nn.Linear | nn.Embedding)}
    embedding = id(model.get_input_embeddings().weight)
    for key, weight in weights.items():
        stored = kind_of(weight.shape[1], wanted_for(EMBEDDING if key == embedding else "", kind))
        rows = quantized(weight.float().numpy(), stored)
        weight.copy_(torch.from_numpy(dequantize(rows, stored).reshape(weight.shape)))
