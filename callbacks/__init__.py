"""Lightning callbacks: when things happen in a run, and which."""

from callbacks.budget_sampling import BudgetSampling
from callbacks.exact_resume import ExactResume
from callbacks.flextron_checkpoint import FlextronCheckpointWriter
from callbacks.latency_profiling import LatencyProfiling
from callbacks.pareto_report import ParetoReport
from callbacks.predictions import PredictionWriter
from callbacks.progress import StepBar, StepLines, progress_bar
from callbacks.router_report import RouterReport
from callbacks.surrogate_guidance import SurrogateGuidance
from callbacks.tensorboard import TensorBoardOverview

__all__ = [
    "BudgetSampling",
    "ExactResume",
    "FlextronCheckpointWriter",
    "LatencyProfiling",
    "ParetoReport",
    "PredictionWriter",
    "RouterReport",
    "StepBar",
    "StepLines",
    "SurrogateGuidance",
    "TensorBoardOverview",
    "progress_bar",
]
