"""Cost tables: what a sub-network costs, per block and choice plus a fixed part."""

from flextron_lit.costs.counted import COUNTED, parameter_table
from flextron_lit.costs.dynamic import DYNAMIC_COUNTED, dynamic_table
from flextron_lit.costs.table import CostTable
from flextron_lit.costs.workload import Workload
