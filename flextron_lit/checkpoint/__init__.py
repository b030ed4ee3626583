"""The Flextron checkpoint, the run folder around it, and the elastic network that is read from it.

In reading order:

- `folder`: what lies in a Flextron checkpoint; reading it, and noticing damage
- `writing`: writing one whole, or as another with some files more
- `weights`: its tensors one by one, never all at once
- `description`, `comparison`: what `info` says of one, and `diff` of two
- `in_memory`: from a checkpoint or dense model to a network that computes and answers budgets
- `run_folder`: what a run keeps, and whether it is new, to be resumed or finished: here a run resumes, `begin`
- `run_config`: the config that it keeps, and that of a run of an older program
- `resume_io`: how the state of an unfinished run reaches the disk (what is in it: `callbacks/exact_resume.py`)
- `keywords`: what Hugging Face's `from_pretrained` and `save_pretrained` may be asked
- `location`: which checkpoint a folder on the command line means
"""

from flextron_lit.checkpoint.folder import (
    COMPENSATION,
    CONFIG,
    MAX_SHARD_SIZE,
    MEND,
    RECORD,
    FlextronCheckpoint,
    StageRecord,
    digest,
    evaluations,
    is_flextron,
    other_files,
    read,
    read_compensation,
    read_config,
    verify,
    verify_small,
    weight_files,
)
from flextron_lit.checkpoint.writing import extend, note_evaluation, write
