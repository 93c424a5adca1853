"""One line for a result page: the day, the commands, the machine and the versions."""

import datetime
import importlib.metadata
import platform
from collections.abc import Sequence
from pathlib import Path

from secateur.deploy import runner


def setting(commands: str, packages: Sequence[str], *more: str) -> str:
    """The line.

    commands: how the page is made, in Markdown. packages: whose versions count. more: what else belongs to the machine,
    such as how many threads ran.
    """
    machine = runner.machine()
    wide = "AVX-512" if "avx512f" in Path("/proc/cpuinfo").read_text() else "AVX2, no AVX-512"
    parts = [f"{machine['cores']} cores that other programs used too", *more]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return (
        f"{datetime.date.today()}, {commands}. {machine['processor']} ({wide}), {', '.join(parts)}; "
        f"{platform.system()}, Python {platform.python_version()}, {versions}."
    )
