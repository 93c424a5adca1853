"""What `secateur` alone prints: what people come for, each with a line to begin with."""

from secateur._version import __version__

LINES = (
    (
        "make a model faster or smaller",
        "secateur prune ./model --data rows.csv --speed-up 2 --on onnx --output ./small",
    ),
    ("look inside: what can go, and what cannot", "secateur inspect ./model"),
    ("score it beside the dense model", "secateur eval ./small --data test.csv --against ./model"),
    ("write it for a runtime, checked there", "secateur export ./small --to onnx --output ./program"),
    ("time both on every runtime that is installed", "secateur bench ./model ./small"),
)
"""What for, and a command for it."""


def screen() -> str:
    """The text of the first screen, at most 80 columns wide."""
    parts = [f"secateur {__version__} makes a trained Transformer smaller and faster, and proves it.", ""]
    for purpose, line in LINES:
        parts += [purpose, f"  {line}"]
    parts += [
        "",
        "see all of it on a real model: secateur demo; what is installed: secateur doctor",
        "all commands: secateur --help; the options of one: secateur prune --help",
    ]
    return "\n".join(parts)
