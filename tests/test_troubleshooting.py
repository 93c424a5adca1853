"""docs/troubleshooting.md quotes sentences that the source can say."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
QUOTE = re.compile(r"^> (?P<ticks>`+) ?(?P<sentence>.+?) ?(?P=ticks)$", re.MULTILINE)
HOLE = "\N{OBJECT REPLACEMENT CHARACTER}"


def templates(source):
    """Every text of a module, with a hole for what is filled in."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else HOLE for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield re.sub(r"\{\w+\}", HOLE, node.value)  # one that `format` fills


def said(sentence, spoken):
    """Whether a text of the source begins as the sentence, which may end in `...` or before what is added to it."""
    return "\n" + HOLE.join(re.split(r"<[^<>]*>", sentence.removesuffix("..."))) in "\n" + spoken


def test_every_quoted_sentence_stands_in_the_source():
    texts = "\n".join(
        text.replace("\n", " ") for path in (ROOT / "src").rglob("*.py") for text in templates(path.read_text())
    )
    quoted = [found["sentence"] for found in QUOTE.finditer((ROOT / "docs" / "troubleshooting.md").read_text())]
    assert len(quoted) >= 20
    assert [sentence for sentence in quoted if not said(sentence, texts)] == []


def test_a_sentence_is_found_by_its_fixed_parts_in_their_order():
    spoken = next(templates("x = f'{a} lacks {b}; copy it'"))
    assert said("<folder> lacks <name>; copy it", spoken)
    assert said("<folder> lacks <name>; ...", spoken)
    assert not said("<folder> lacks a name; copy it", spoken)
    assert not said("<name>; copy it", spoken)
