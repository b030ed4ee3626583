"""A Trainer for measuring: one step, and nothing that a run would write or show."""

BARE = {
    "accelerator": "cpu",
    "max_steps": 1,
    "limit_val_batches": 0,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
}
"""Arguments of Lightning's Trainer."""
