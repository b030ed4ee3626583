"""Lightning callbacks: when things happen in a run, and which.

The package is `flextron_lit.callbacks`, a link to this folder; configs may say `callbacks` for short.
"""

from flextron_lit.callbacks.budget_sampling import BudgetSampling
from flextron_lit.callbacks.exact_resume import ExactResume
from flextron_lit.callbacks.flextron_checkpoint import FlextronCheckpointWriter
from flextron_lit.callbacks.latency_profiling import LatencyProfiling
from flextron_lit.callbacks.pareto_report import ParetoReport
from flextron_lit.callbacks.predictions import PredictionWriter
from flextron_lit.callbacks.progress import StepBar, StepLines, progress_bar
from flextron_lit.callbacks.router_report import RouterReport
from flextron_lit.callbacks.surrogate_guidance import SurrogateGuidance
from flextron_lit.callbacks.tensorboard import TensorBoardOverview
from flextron_lit.callbacks_name import NAME, adopt

if __name__ == NAME:
    # found as a folder of the checkout: without this there would be a second set of classes
    adopt()
