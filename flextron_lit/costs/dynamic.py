"""Counted costs of a dynamic router: what grouped execution computes, as the mean over tokens (ours).

A table is linear in the shares of the tokens that take each choice. Keys and values are those of all groups for every
token, so they belong to the fixed part, with the routers' own products. Ratios are of the full network run statically.
"""

from __future__ import annotations

from collections.abc import Callable

from flextron_lit.costs.counted import COUNTED, decode_context, decode_flops_table, prefill_flops_table
from flextron_lit.costs.table import CostTable, weighted_sum
from flextron_lit.costs.workload import Workload
from flextron_lit.elastic.backbone import ElasticBackbone, ElasticBlock


def dynamic_prefill_flops_table(backbone: ElasticBackbone, workload: Workload) -> CostTable:
    """Floating-point operations of a prefill, counted as for a sub-network.

    Attention over pairs runs over the groups of the widest token of the pass: the full width, whatever most tokens
    take. It counts as fixed.
    """
    static, tokens = prefill_flops_table(backbone, workload), workload.prompt_tokens
    return _flops_table(backbone, static, workload.batch_size, tokens, lambda _: float(tokens))


def dynamic_decode_flops_table(backbone: ElasticBackbone, workload: Workload) -> CostTable:
    """Floating-point operations of one decode step, the mean over the steps.

    A token alone attends with its own width; the tokens of a batch with that of the widest, as in a prefill.
    """
    static = decode_flops_table(backbone, workload)
    return _flops_table(backbone, static, workload.batch_size, 1, lambda e: decode_context(workload, e.window))


def dynamic_flops_table(backbone: ElasticBackbone, workload: Workload) -> CostTable:
    """Floating-point operations of the whole request: one prefill and all decode steps."""
    prefill, decode = dynamic_prefill_flops_table(backbone, workload), dynamic_decode_flops_table(backbone, workload)
    return weighted_sum("flops", [(1, prefill), (workload.decode_steps, decode)])


DYNAMIC_COUNTED: dict[str, Callable[[ElasticBackbone, Workload], CostTable]] = {
    "flops": dynamic_flops_table,
    "prefill_flops": dynamic_prefill_flops_table,
    "decode_flops": dynamic_decode_flops_table,
}
"""Every counted cost that depends on what a dynamic router chooses, by the name of its table."""


def dynamic_table(backbone: ElasticBackbone, name: str, workload: Workload) -> CostTable:
    """A counted cost of a dynamic router by name.

    Raises:
        ValueError: if no choice of a dynamic router changes it, or there is none of that name.
    """
    known = ", ".join(DYNAMIC_COUNTED)
    if name in DYNAMIC_COUNTED:
        return DYNAMIC_COUNTED[name](backbone, workload)
    refuse_constant(name)
    raise ValueError(f"there is no counted cost {name!r} of a dynamic router; there are {known}")


def refuse_constant(name: str) -> None:
    """Refuse a cost that no choice of a dynamic router changes.

    Raises:
        ValueError: with the reason.
    """
    if name in COUNTED and name not in DYNAMIC_COUNTED:
        raise ValueError(
            f"{name} is the same whatever a dynamic router chooses: every token may take any width, so all weights and "
            f"all keys and values are there. Use a static router for it, or one of {', '.join(DYNAMIC_COUNTED)} or a "
            "latency here"
        )


def _flops_table(
    backbone: ElasticBackbone, static: CostTable, batch: int, tokens: int, context: Callable[[ElasticBlock], float]
) -> CostTable:
    """The table of a pass from that of sub-networks, which counts everything at a token's own width."""
    rows, fixed = [], static.fixed
    for elastic, row in zip(backbone.blocks, static.blocks, strict=True):
        widths = elastic.block.widths
        features = elastic.outgoing.shape[-1]
        # the router: a linear map to its choices
        fixed += 2.0 * batch * tokens * len(widths) * features
        if elastic.block.kind == "attention":
            same = [_for_all(elastic, width, batch, tokens, context(elastic)) for width in widths]
            fixed += same[-1]
            row = tuple(cost - common for cost, common in zip(row, same, strict=True))
        rows.append(row)
    return CostTable(static.name, static.unit, fixed, tuple(rows), reference=static.full)


def _for_all(elastic: ElasticBlock, width: int, batch: int, tokens: int, context: float) -> float:
    """What attention of a width computes in ways that do not depend on a token's choice, if all have that width."""
    key_rows = width * elastic.head_dim
    products = 2.0 * batch * tokens * 2 * key_rows * elastic.outgoing.shape[-1]
    if batch * tokens == 1:
        return products
    return products + 2 * 2.0 * batch * tokens * context * key_rows * elastic.heads_per_unit
