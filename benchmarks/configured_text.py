"""The text of the project's own configs, as benchmarks read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from flextron_lit.data import TextDataModule, TextDomain

ROOT = Path(__file__).parent.parent


def settings_of(name: str) -> tuple[dict[str, TextDomain], dict[str, Any]]:
    """The domains of a file of configs/data, and what else it says."""
    settings = yaml.safe_load((ROOT / "configs/data" / f"{name}.yaml").read_text())["data"]["init_args"]
    return {name: TextDomain(**domain) for name, domain in settings.pop("domains").items()}, settings


def configured(name: str, checkpoint: str, block_size: int, **others: Any) -> TextDataModule:
    """The text of such a file, but for what is given."""
    domains, settings = settings_of(name)
    data = TextDataModule(domains, tokenizer=checkpoint, **{**settings, "block_size": block_size, **others})
    data.prepare_data()
    return data


def embedded(checkpoint: str, block_size: int, **others: Any) -> TextDataModule:
    """The embedded domains, as the quickstart configures them."""
    return configured("embedded", checkpoint, block_size, **others)
