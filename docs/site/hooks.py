"""What the site needs beside Markdown: links that leave docs/ lead to the repository, and notebooks become pages."""

import json
import posixpath
import re
from pathlib import Path
from typing import Any

_CODE = re.compile(r"<code>[^<]*</code>")
_OPTION = re.compile(r"(?<![\w-])--?[\w-]+")
_LINK = re.compile(r"(\]\()(\.\./[^)\s#]+)(#[^)\s]*)?(\))")


def leave_docs(markdown: str, page: str, root: Path, repository: str) -> str:
    """Markdown of a page whose links out of docs/ are addresses of the repository.

    page: the path of the page from docs/, such as `notebooks/decoder.md`.
    """

    def address(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link[2]))
        if target.startswith("docs/"):
            return link[0]
        kind = "tree" if (root / target).is_dir() else "blob"
        return f"{link[1]}{repository}/{kind}/main/{target}{link[3] or ''}{link[4]}"

    return _LINK.sub(address, markdown)


def as_markdown(notebook: dict[str, Any], name: str) -> str:
    """A Jupyter notebook with its printed outputs as a page, under its first heading the way to the file itself."""
    parts: list[str] = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        printed = "".join("".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream")
        if printed:
            parts.append(f"```text\n{printed.rstrip()}\n```")
    parts.insert(1, f"[The notebook]({name}) itself opens in Jupyter.")
    return "\n\n".join(parts) + "\n"


def unbroken(html: str) -> str:
    """A page in which no line of inline code ends inside of an option: browsers break lines after each hyphen."""
    return _CODE.sub(lambda code: _OPTION.sub(r'<span class="option">\g<0></span>', code[0]), html)


def on_files(files: Any, config: Any) -> Any:
    """Adds a page for each notebook."""
    for file in list(files):
        if file.src_uri.endswith(".ipynb"):
            path = Path(config["docs_dir"]) / file.src_uri
            content = as_markdown(json.loads(path.read_text(encoding="utf-8")), path.name)
            files.append(type(file).generated(config, file.src_uri.removesuffix(".ipynb") + ".md", content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **kwargs: Any) -> str:
    """Mends the links of a page before it is rendered."""
    root = Path(config["docs_dir"]).parent
    return leave_docs(markdown, page.file.src_uri, root, config["extra"]["repository"])


def on_page_content(html: str, **kwargs: Any) -> str:
    """Mends a page after it is rendered."""
    return unbroken(html)
