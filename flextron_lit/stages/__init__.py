"""The LightningModules: one a stage, wiring only."""

from flextron_lit.stages.calibration import Calibration
from flextron_lit.stages.elastic_training import ElasticTraining
from flextron_lit.stages.objective import Distillation, FullWeight
from flextron_lit.stages.stage import NonFiniteError, Pass, Stage

__all__ = ["Calibration", "Distillation", "ElasticTraining", "FullWeight", "NonFiniteError", "Pass", "Stage"]
