"""Cost tables: what a sub-network costs, per block and choice plus a fixed part."""

from flextron_lit.costs.counted import parameter_table
from flextron_lit.costs.table import CostTable

__all__ = ["CostTable", "parameter_table"]
