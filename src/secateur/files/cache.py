"""Where secateur keeps what it measured or made once and wants again."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """The folder SECATEUR_CACHE, else `secateur` in the user's cache folder; it need not exist yet."""
    folder = os.environ.get("SECATEUR_CACHE")
    if folder is None:
        folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "secateur")
    return Path(folder)
