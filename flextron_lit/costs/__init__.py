"""Cost tables: what a sub-network costs, per block and choice plus a fixed part."""

from flextron_lit.costs.counted import (
    COUNTED,
    decode_flops_table,
    flops_table,
    kv_bytes_table,
    memory_table,
    parameter_table,
    prefill_flops_table,
)
from flextron_lit.costs.dynamic import DYNAMIC_COUNTED, dynamic_table
from flextron_lit.costs.table import CostTable, weighted_sum
from flextron_lit.costs.workload import Workload

__all__ = [
    "COUNTED",
    "DYNAMIC_COUNTED",
    "CostTable",
    "Workload",
    "decode_flops_table",
    "dynamic_table",
    "flops_table",
    "kv_bytes_table",
    "memory_table",
    "parameter_table",
    "prefill_flops_table",
    "weighted_sum",
]
