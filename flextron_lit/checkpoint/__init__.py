"""The Flextron checkpoint, the run folder around it, and the elastic network that is read from it."""

from flextron_lit.checkpoint.folder import (
    CONFIG,
    ORDER,
    RECORD,
    WEIGHT_INDEX,
    WEIGHTS,
    FlextronCheckpoint,
    StageRecord,
    digest,
    evaluations,
    is_flextron,
    read,
    read_config,
    verify,
    weight_files,
)
from flextron_lit.checkpoint.writing import extend, note_evaluation, write

__all__ = [
    "CONFIG",
    "ORDER",
    "RECORD",
    "WEIGHTS",
    "WEIGHT_INDEX",
    "FlextronCheckpoint",
    "StageRecord",
    "digest",
    "evaluations",
    "extend",
    "is_flextron",
    "note_evaluation",
    "read",
    "read_config",
    "verify",
    "weight_files",
    "write",
]
