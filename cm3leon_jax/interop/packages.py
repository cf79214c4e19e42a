"""Files that installed packages carry: weights are read from there, no code is run."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path


def located(package: str, inside: str) -> Path | None:
    """Where an installed package keeps a file or folder; None without it."""
    try:
        found = importlib.metadata.distribution(package).locate_file(inside)
    except importlib.metadata.PackageNotFoundError:
        return None
    path = Path(str(found))
    return path if path.exists() else None
