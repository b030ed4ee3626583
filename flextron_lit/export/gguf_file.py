"""A sub-network as a GGUF file, for llama.cpp and what is built on it: written, and read back."""

import copy
import errno
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType, RopeScalingType
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from flextron_lit.export.gguf_tokenizer import BytePairs
from flextron_lit.export.small_model import SmallModel

UNIFORM = {
    "llama": MODEL_ARCH.LLAMA,
    "mistral": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
    "smollm3": MODEL_ARCH.SMOLLM3,
}
"""What GGUF calls a network whose layers are alike, by the `model_type` of the full network."""
NOT_IN_DECI = {
    "qwen2": "biases of queries, keys and values",
    "qwen3": "norms of queries and keys",
    "smollm3": "layers without positions",
}
"""What a family needs that the architecture for layers of different widths does not have."""
ROTATIONS = ("default", "linear", "llama3", "yarn")
"""Kinds of positions that llama.cpp computes; in others frequencies change with a text's length."""
WITH_FREQUENCIES = ("llama", "mistral")
"""Families for which it reads frequencies one by one, as llama3 has them; the other kinds are numbers in the header."""
BETAS = {"beta_fast": 32, "beta_slow": 1}
"""Of yarn: what llama.cpp computes with, whatever a file says."""
INTERLEAVED = (MODEL_ARCH.LLAMA, MODEL_ARCH.DECI, MODEL_ARCH.SMOLLM3)
"""Architectures that rotate neighbouring rows of a head, where transformers rotates its two halves."""
TYPES = {
    "float32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "float16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bfloat16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
"""How matrices may be stored; what is no matrix (norms, biases) stays in float32."""
Q8_BLOCK = 32
"""Numbers that share a scale in `q8_0`; rows that are no whole number of them are stored as float16."""
SUFFIXES = (".weight", ".bias")
ZERO_NEURONS = Q8_BLOCK
"""How many neurons of zeros stand for a skipped MLP (ours): where llama.cpp reads 0 it leaves out the attention too."""


def architecture(small: SmallModel) -> MODEL_ARCH:
    """What GGUF calls this network: the family's own name, or `deci` where layers differ.

    Raises:
        ValueError: if llama.cpp has nothing that computes it; the message says why.
    """
    if small.family not in UNIFORM:
        raise ValueError(f"no GGUF of {small.family}: only networks like Llama are written ({', '.join(UNIFORM)})")
    reason = _why_not_model(small.dense) or _why_not_widths(small)
    if reason is not None:
        raise ValueError(f"no GGUF of this {small.family}: {reason}")
    return UNIFORM[small.family] if small.uniform else MODEL_ARCH.DECI


def _why_not_model(config: PreTrainedConfig) -> str | None:
    """What llama.cpp cannot compute of a network, whatever its widths; None if it can."""
    if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        return "biases are not written"
    if getattr(config, "sliding_window", None):
        return f"llama.cpp has no sliding window of {config.sliding_window} for it"
    if config.hidden_act != "silu":
        return f"llama.cpp computes it with silu, not {config.hidden_act}"
    return _why_not_positions(config)


def _why_not_positions(config: PreTrainedConfig) -> str | None:
    rope = config.rope_parameters
    kind = rope["rope_type"]
    if kind not in ROTATIONS:
        return f"positions of type {kind} are not written, only {', '.join(ROTATIONS)}"
    if kind == "llama3" and config.model_type not in WITH_FREQUENCIES:
        return f"llama.cpp reads positions of type llama3 for {' and '.join(WITH_FREQUENCIES)} alone"
    betas = {name: rope.get(name) or known for name, known in BETAS.items()}
    if kind == "yarn" and (betas != BETAS or not rope.get("truncate", True)):
        return f"llama.cpp computes yarn with {BETAS}, truncated, and the config has {betas}"
    every_fourth = [int((layer + 1) % 4 != 0) for layer in range(config.num_hidden_layers)]
    if getattr(config, "no_rope_layers", every_fourth) != every_fourth:
        return "llama.cpp leaves positions out in every fourth layer, not in others"
    return None


def _why_not_widths(small: SmallModel) -> str | None:
    """What llama.cpp cannot compute of these widths; None if it can."""
    if not small.uniform and small.family in NOT_IN_DECI:
        return (
            "its layers differ in width, and what llama.cpp has for that (deci) has no "
            f"{NOT_IN_DECI[small.family]}; take a sub-network whose layers are alike, or --format remote-code"
        )
    heads = small.groups[0] * small.heads_per_group
    if small.family == "qwen2" and heads * small.head_dim != small.dense.hidden_size:
        return (
            f"llama.cpp demands that the heads fill the hidden size of {small.dense.hidden_size}, and {heads} of size "
            f"{small.head_dim} do not; take a sub-network of all heads, or --format hf"
        )
    return None


def write(path: Path, small: SmallModel, tokenizer: BytePairs, *, name: str, stored: str) -> None:
    """Write the file.

    Args:
        path: where.
        small: the network.
        tokenizer: its tokenizer.
        name: what the model is called.
        stored: a key of `TYPES`.

    Raises:
        ValueError: as `architecture`.
    """
    arch = architecture(small)
    writer = GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_name(name)
    writer.add_file_type(TYPES[stored][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _describe(writer, small)
    tokenizer.write(writer)
    for theirs, tensor in _tensors(small, arch):
        kind = _kind(tensor, stored)
        writer.add_tensor(theirs, gguf.quantize(tensor.numpy(), kind), raw_dtype=kind)
    with _full_disk():
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def read_back(path: Path, small: SmallModel) -> PreTrainedModel:
    """The network with the weights that a file holds.

    Raises:
        ValueError: if the file is not one of this network.
    """
    tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    model = copy.deepcopy(small.model).float()
    for own, theirs, heads in _names(small, architecture(small)):
        if theirs not in tensors:
            raise ValueError(f"{path} has no tensor {theirs}")
        stored = tensors[theirs]
        weight = torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type).copy())
        parameter = model.get_parameter(own)
        if weight.shape != parameter.shape:
            raise ValueError(f"{theirs} of {path} has shape {tuple(weight.shape)}, not {tuple(parameter.shape)}")
        with torch.no_grad():
            parameter.copy_(_halved(weight, heads) if heads else weight)
    return model.eval()


@contextmanager
def _full_disk() -> Iterator[None]:
    """Give a write that was cut off the system's number, which numpy leaves out."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise


def _describe(writer: GGUFWriter, small: SmallModel) -> None:
    """The sizes of the network; of uniform ones as numbers, else a number a layer, where 0 heads are no attention."""
    config = small.dense
    heads = [groups * small.heads_per_group for groups in small.groups]
    writer.add_block_count(len(small.groups))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_head_count(heads[0] if small.uniform else heads)
    writer.add_head_count_kv(small.groups[0] if small.uniform else list(small.groups))
    writer.add_feed_forward_length(small.neurons[0] if small.uniform else [n or ZERO_NEURONS for n in small.neurons])
    writer.add_key_length(small.head_dim)
    writer.add_value_length(small.head_dim)
    writer.add_rope_dimension_count(small.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    _describe_positions(writer, small)


def _describe_positions(writer: GGUFWriter, small: SmallModel) -> None:
    """How queries and keys are turned; llama3 has a tensor beside."""
    rope = small.dense.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        rotary: Any = small.model.get_submodule("model.rotary_emb")
        # llama.cpp multiplies by what the factor means to yarn by default
        writer.add_rope_scaling_attn_factors(rotary.attention_scaling / (1 + 0.1 * math.log(rope["factor"])))


def _names(small: SmallModel, arch: MODEL_ARCH) -> Iterator[tuple[str, str, int]]:
    """Every weight's name here and in the file, and its heads if their rows are stored in another order, else 0."""
    known = gguf.get_tensor_name_map(arch, len(small.groups))
    for own, _ in small.model.named_parameters():
        parts = own.split(".")
        layer = int(parts[2]) if parts[1] == "layers" else None
        if layer is not None and parts[3] == "input_layernorm" and not small.groups[layer]:
            # llama.cpp expects no norm in front of an attention that is left out
            continue
        theirs = known.get_name(own, try_suffixes=SUFFIXES)
        assert theirs is not None, f"GGUF has no name for {own}"
        counts = {"q_proj": small.heads_per_group, "k_proj": 1}
        rotated = layer is not None and arch in INTERLEAVED and parts[-2] in counts
        yield own, theirs, counts[parts[-2]] * small.groups[layer] if rotated and layer is not None else 0


def _tensors(small: SmallModel, arch: MODEL_ARCH) -> Iterator[tuple[str, Tensor]]:
    """What the file holds, by its names there, in float32 on the CPU."""
    rope = small.dense.rope_parameters
    if rope["rope_type"] == "llama3":
        # by what llama.cpp divides its frequencies to get those of the model, [head_dim / 2]
        plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, small.head_dim, 2) / small.head_dim)
        yield "rope_freqs.weight", plain / small.model.get_buffer("model.rotary_emb.inv_freq").float().cpu()
    for own, theirs, heads in _names(small, arch):
        weight = small.model.get_parameter(own).detach().float().cpu()
        yield theirs, _interleaved(weight, heads) if heads else weight
    size = small.dense.hidden_size
    shapes = {"gate": (ZERO_NEURONS, size), "up": (ZERO_NEURONS, size), "down": (size, ZERO_NEURONS)}
    for layer, neurons in enumerate(small.neurons):
        if not neurons:
            # for MLPs that are skipped, neurons that add nothing
            yield from ((f"blk.{layer}.ffn_{part}.weight", torch.zeros(shape)) for part, shape in shapes.items())


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of every head from halves (0, 1, ... | 0', 1', ...) to pairs (0, 0', 1, 1', ...)."""
    return weight.view(heads, 2, -1, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def _halved(weight: Tensor, heads: int) -> Tensor:
    """Inverse of `_interleaved`."""
    return weight.view(heads, -1, 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def _kind(weight: Tensor, stored: str) -> GGMLQuantizationType:
    if weight.dim() < 2:
        return GGMLQuantizationType.F32
    if stored == "q8_0" and weight.shape[-1] % Q8_BLOCK:
        return GGMLQuantizationType.F16
    return TYPES[stored][0]
