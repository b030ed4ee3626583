"""Flextron as a Lightning app: one pretrained LLM becomes a family of nested sub-networks."""

from typing import TYPE_CHECKING, Any

from flextron_lit import callbacks_name

if TYPE_CHECKING:
    from flextron_lit.model import FlextronModel

__all__ = ["FlextronModel"]

callbacks_name.install()


def __getattr__(name: str) -> Any:
    """Import when asked for: commands that read files alone must not wait for transformers."""
    if name != "FlextronModel":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from flextron_lit.model import FlextronModel

    return FlextronModel
