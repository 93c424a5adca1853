"""secateur doctor: what is installed, what is missing for what, and whether the kernels run."""

from typing import TYPE_CHECKING

import typer

from secateur.cli import common

if TYPE_CHECKING:
    from secateur.jobs.doctor import Diagnosis, Extra

NAME = "doctor"
EXAMPLES = ("secateur doctor", "secateur doctor --json")
BROKEN = 1
"""Exit code when secateur itself cannot work."""


def command(*, json: common.JsonOption = False) -> None:
    """Show what is installed, what is missing for what, and whether secateur's kernels run (exit code 1 if not)."""
    from secateur.jobs.doctor import diagnose

    found = diagnose()
    if json:
        common.print_json(found.as_json())
    else:
        show(found)
    if found.problems:
        raise typer.Exit(BROKEN)


def show(found: "Diagnosis") -> None:
    """Print the machine, the kernels, the cache, a table of the extras, and the lines that install what is missing."""
    machine, kernels = found.machine, found.kernels
    common.say(f"secateur {found.version}, Python {machine['python']}, {machine['system']}")
    threads = "OMP_NUM_THREADS is not set" if found.omp_threads is None else f"OMP_NUM_THREADS is {found.omp_threads}"
    common.say(f"processor  {machine['processor']}: {machine['cores']} cores, {found.usable_cores} for us; {threads}")
    others = ", ".join(name for name in kernels.available if name != kernels.isa)
    operators = "with" if kernels.has_onnx else "without"
    compiled = f"compiled, run on {kernels.isa} (also there: {others or 'none'})" if kernels.is_compiled else "missing"
    common.say(f"kernels    {compiled}, {operators} operators for ONNX Runtime")
    size = f"{common.megabytes(found.cache_bytes)} MB in {found.cache_files:,} files"
    common.say(f"cache      {found.cache}: {size}; it may be deleted")
    common.print_table(
        "What is installed", ["extra", "for", "packages"], [row(extra) for extra in found.extras], left=3
    )
    if not found.extras:
        common.say(
            "secateur's metadata is not there, so the packages of its extras are not known: pip install secateur"
        )
    if missing := [extra for extra in found.extras if extra.missing]:
        common.say("missing:")
        for extra in missing:
            common.say(f"  {extra.purpose}: {extra.install}")
    for problem in found.problems:
        common.say(f"problem: {problem}")


def row(extra: "Extra") -> tuple[str, str, str]:
    """One row of the table: versions, `-` for what is not installed, `!` for what is too old."""
    parts = []
    for package in extra.packages:
        old = "" if package.is_good or package.version is None else f"! ({package.wanted})"
        parts.append(f"{package.name} {package.version or '-'}{old}")
    return extra.name, extra.purpose, ", ".join(parts)
