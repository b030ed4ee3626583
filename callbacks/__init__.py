"""Lightning callbacks: when things happen in a run, and which."""

from callbacks.budget_sampling import BudgetSampling
from callbacks.exact_resume import ExactResume
from callbacks.flextron_checkpoint import FlextronCheckpointWriter
from callbacks.pareto_report import ParetoReport
from callbacks.predictions import PredictionWriter

__all__ = ["BudgetSampling", "ExactResume", "FlextronCheckpointWriter", "ParetoReport", "PredictionWriter"]
