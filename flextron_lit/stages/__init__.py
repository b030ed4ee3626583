"""The LightningModules: one a stage, wiring only."""

from flextron_lit.stages.base import Stage
from flextron_lit.stages.calibration import Calibration
from flextron_lit.stages.dynamic_router import DynamicRouterTraining
from flextron_lit.stages.elastic_training import ElasticTraining
from flextron_lit.stages.joint_tuning import JointTuning
from flextron_lit.stages.loss_parts import Pass
from flextron_lit.stages.objective import Distillation, FullWeight
from flextron_lit.stages.router_training import RouterTraining
from flextron_lit.stages.static_router import StaticRouterTraining
from flextron_lit.stages.stop_on_nan import NonFiniteError
from flextron_lit.stages.surrogate_training import SurrogateTraining
from flextron_lit.stages.tuned_router import Remeasuring
from flextron_lit.stages.watched_losses import WatchedStage
