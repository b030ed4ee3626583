"""Costs that follow from the shapes alone: parameters, FLOPs, bytes of the KV cache (ours; the paper has latencies)."""

from collections.abc import Callable
from functools import partial
from statistics import fmean

import torch

from flextron_lit.costs.table import CostTable, weighted_sum
from flextron_lit.costs.workload import Phase, Workload
from flextron_lit.elastic.backbone import ElasticBackbone, ElasticBlock

OfPass = Callable[[ElasticBackbone, Workload, Phase], CostTable]
"""What counts one pass of a request."""


def parameter_table(backbone: ElasticBackbone) -> CostTable:
    """Parameters. Tied weights count once; a skipped block counts nothing, not even the biases all widths share.

    The norms beside blocks always count, though a model that is extracted lacks those of layers skipped as a whole.
    """
    blocks = _per_choice(backbone, _parameters)
    total = sum(parameter.numel() for parameter in backbone.parameters.values())
    return CostTable("parameters", "parameters", total - sum(row[-1] for row in blocks), blocks)


def pass_flops_table(backbone: ElasticBackbone, workload: Workload, phase: Phase) -> CostTable:
    """Floating-point operations of a prefill, or of a decode step, the mean over the steps.

    Matrix products with weights, and attention over all pairs of tokens. Two a multiplication, as torch's counter
    counts them: masked pairs count, the products that make the rotary positions (under 0.01 %) and everything
    elementwise do not.
    """
    batch, tokens = workload.batch_size, workload.tokens(phase)

    def flops(elastic: ElasticBlock, width: int) -> float:
        matrices = [(axis, tensor) for axis, tensor in elastic.tensors if tensor.dim() == 2]
        weights = sum(axis.prefix_numel(tensor, width, elastic.block.full) for axis, tensor in matrices)
        products = 2.0 * batch * tokens * weights
        if elastic.block.kind == "mlp":
            return products
        # queries with keys, then their weights with the values
        head_rows = width * elastic.heads_per_unit * elastic.head_dim
        return products + 2 * 2.0 * batch * tokens * attended(workload, phase, elastic.window) * head_rows

    head = backbone.model.get_output_embeddings().weight
    # logits are computed at the last position alone
    return CostTable(f"{phase}_flops", "FLOPs", 2.0 * batch * head.numel(), _per_choice(backbone, flops))


def flops_table(backbone: ElasticBackbone, workload: Workload, of_pass: OfPass = pass_flops_table) -> CostTable:
    """Floating-point operations of the whole request: one prefill and all decode steps, each as `of_pass` counts it."""
    parts = [(count, of_pass(backbone, workload, phase)) for phase, count in workload.phases.items()]
    return weighted_sum("flops", parts)


def kv_bytes_table(backbone: ElasticBackbone, workload: Workload) -> CostTable:
    """Bytes of the KV cache when the request ends, in the workload's dtype."""
    size = _bytes(workload)

    def kv_bytes(elastic: ElasticBlock, width: int) -> float:
        if elastic.block.kind == "mlp":
            return 0.0
        # the newest token of a window is the one that reads the cache
        kept = workload.total_tokens if elastic.window is None else min(workload.total_tokens, elastic.window - 1)
        return float(2 * width * elastic.head_dim * workload.batch_size * kept * size)

    return CostTable("kv_bytes", "bytes", 0.0, _per_choice(backbone, kv_bytes))


def memory_table(backbone: ElasticBackbone, workload: Workload) -> CostTable:
    """Bytes of the weights and of the KV cache when the request ends, in the workload's dtype."""
    weights = weighted_sum("weights", [(_bytes(workload), parameter_table(backbone))], unit="bytes")
    return weighted_sum("memory", [(1, weights), (1, kv_bytes_table(backbone, workload))])


COUNTED: dict[str, Callable[[ElasticBackbone, Workload], CostTable]] = {
    "parameters": lambda backbone, _: parameter_table(backbone),
    "flops": flops_table,
    "prefill_flops": partial(pass_flops_table, phase="prefill"),
    "decode_flops": partial(pass_flops_table, phase="decode"),
    "kv_bytes": kv_bytes_table,
    "memory": memory_table,
}
"""Every counted cost by the name of its table."""


def attended(workload: Workload, phase: Phase, window: int | None) -> float:
    """Tokens that each token of a pass attends to, itself included, on average over decode steps.

    A prefill computes all pairs, those masked because they lie outside a window, too. A decode step attends to no more
    than a window, if any, since the cache holds no others.
    """
    if phase == "prefill":
        return float(workload.prompt_tokens)
    if window is None or window >= workload.prompt_tokens + workload.decode_steps:
        return workload.decode_context
    steps = range(workload.prompt_tokens + 1, workload.prompt_tokens + workload.generated_tokens)
    return fmean(min(context, window) for context in steps) if steps else float(window)


def _bytes(workload: Workload) -> int:
    """Of one number."""
    return getattr(torch, workload.dtype).itemsize


def _per_choice(backbone: ElasticBackbone, cost: Callable[[ElasticBlock, int], float]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(cost(e, width) if width else 0.0 for width in e.block.widths) for e in backbone.blocks)


def _parameters(elastic: ElasticBlock, width: int) -> float:
    # a width's own projection stands in the place of its columns of the common one
    carried = sum(axis.prefix_numel(tensor, width, elastic.block.full) for axis, tensor in elastic.tensors)
    return float(carried + sum(tensor.numel() for tensor in elastic.shared))
