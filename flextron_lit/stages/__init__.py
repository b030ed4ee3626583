"""The LightningModules: one a stage, wiring only."""

from flextron_lit.stages.elastic_training import Calibration, Distillation, ElasticTraining
from flextron_lit.stages.stage import NonFiniteError, Pass, Stage

__all__ = ["Calibration", "Distillation", "ElasticTraining", "NonFiniteError", "Pass", "Stage"]
