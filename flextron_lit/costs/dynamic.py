"""Counted costs of a dynamic router: what grouped execution computes, as the mean over tokens (ours).

A table is linear in the shares of the tokens that take each choice. Keys and values are those of all groups for every
token, so they belong to the fixed part, with the routers' own products. Ratios are of the full network run statically.
"""

from collections.abc import Callable
from functools import partial

from flextron_lit.costs.counted import COUNTED, attended, flops_table, pass_flops_table
from flextron_lit.costs.table import CostTable
from flextron_lit.costs.workload import Phase, Workload
from flextron_lit.elastic.backbone import ElasticBackbone, ElasticBlock


def routed_pass_flops_table(backbone: ElasticBackbone, workload: Workload, phase: Phase) -> CostTable:
    """Floating-point operations of a prefill or of a decode step, counted as for a sub-network.

    A token alone attends with its own width. Of several at once, attention over pairs runs over the groups of the
    widest: the full width, whatever most tokens take. It counts as fixed.
    """
    static, tokens = pass_flops_table(backbone, workload, phase), workload.batch_size * workload.tokens(phase)
    rows, fixed = [], static.fixed
    for elastic, row in zip(backbone.blocks, static.blocks, strict=True):
        widths = elastic.block.widths
        # the router: a linear map to its choices
        fixed += 2.0 * tokens * len(widths) * elastic.outgoing.shape[-1]
        if elastic.block.kind == "attention":
            context = attended(workload, phase, elastic.window)
            same = [_for_all(elastic, width, tokens, context) for width in widths]
            fixed += same[-1]
            row = tuple(cost - common for cost, common in zip(row, same, strict=True))
        rows.append(row)
    return CostTable(static.name, static.unit, fixed, tuple(rows), reference=static.full)


def _for_all(elastic: ElasticBlock, width: int, tokens: int, context: float) -> float:
    """What attention of a width computes in ways that do not depend on a token's choice, if all have that width."""
    key_rows = width * elastic.head_dim
    products = 2.0 * tokens * 2 * key_rows * elastic.outgoing.shape[-1]
    if tokens == 1:
        return products
    return products + 2 * 2.0 * tokens * context * key_rows * elastic.heads_per_unit


DYNAMIC_COUNTED: dict[str, Callable[[ElasticBackbone, Workload], CostTable]] = {
    "flops": partial(flops_table, of_pass=routed_pass_flops_table),
    "prefill_flops": partial(routed_pass_flops_table, phase="prefill"),
    "decode_flops": partial(routed_pass_flops_table, phase="decode"),
}
"""Every counted cost that depends on what a dynamic router chooses, by the name of its table."""


def dynamic_table(backbone: ElasticBackbone, name: str, workload: Workload) -> CostTable:
    """A counted cost of a dynamic router by name.

    Raises:
        ValueError: if no choice of a dynamic router changes it, or there is none of that name.
    """
    if name in DYNAMIC_COUNTED:
        return DYNAMIC_COUNTED[name](backbone, workload)
    refuse_constant(name)
    raise ValueError(f"there is no counted cost {name!r} of a dynamic router; there are {', '.join(DYNAMIC_COUNTED)}")


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
