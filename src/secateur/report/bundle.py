"""Vega, Vega-Lite and vega-embed as one script, from the package vl-convert-python, which carries them.

Making the script takes seconds of processor time, so it is kept in the cache folder, by the versions of what is in it.
"""

import contextlib
import hashlib
import importlib.util
import os
import secrets
from importlib.metadata import version
from pathlib import Path

from secateur.errors import SecateurError
from secateur.files.cache import cache_folder

PACKAGES = ("jinja2", "vl_convert")
"""Modules that a report needs beside secateur's own dependencies."""
SNIPPET = "window.vegaEmbed = vegaEmbed;"
"""What the script leaves behind for the page."""


def check_packages() -> None:
    """Raises SecateurError when a package that reports need is not installed."""
    for module in PACKAGES:
        if importlib.util.find_spec(module) is None:
            raise SecateurError(f"a report needs the package {module}; install it with: pip install 'secateur[report]'")


def javascript() -> str:
    """The script: it defines `vegaEmbed`, asks for nothing, and may stand inside a page."""
    import vl_convert

    vega, vega_lite = vl_convert.get_vega_version(), vl_convert.get_vegalite_versions()[-1]
    versions = " ".join((version("vl-convert-python"), vega, vega_lite, SNIPPET))
    file = cache_folder() / f"vega-{hashlib.sha256(versions.encode()).hexdigest()[:16]}.js"
    kept = _read(file)
    if kept is not None:
        return kept
    script = vl_convert.javascript_bundle(SNIPPET).replace("</script", "<\\/script").replace("<!--", "<\\!--")
    _keep(file, script)
    return script


def _read(file: Path) -> str | None:
    """What `_keep` wrote; None where there is nothing or something else."""
    try:
        first, _, script = file.read_text(encoding="utf-8").partition("\n")
    except (OSError, UnicodeDecodeError):
        return None
    return script if first == _seal(script) else None


def _keep(file: Path, script: str) -> None:
    """Write the script after a line that names its hash; a cache that cannot be written is no error."""
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(8)}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(f"{_seal(script)}\n{script}", encoding="utf-8", newline="\n")
        os.replace(temporary, file)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _seal(script: str) -> str:
    return f"// {hashlib.sha256(script.encode()).hexdigest()}"
