"""Plain text as documents: .txt by paragraph or line, tables and JSON lines by their text column."""

from pathlib import Path

from secateur.errors import DataError
from secateur.labelled_rows import READERS, read_rows


def read_documents(path: Path | str, text_column: str = "text") -> list[str]:
    """Documents of a file, in its order, empty ones left out.

    A file of a kind that `secateur.labelled_rows` reads has one in each row. Any other file is plain text in UTF-8:
    documents are parted by empty lines, or stand one on each line where there are none.

    Raises DataError for a file that does not exist, is no text, or holds none.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"no text at {path}")
    if path.is_dir() or path.suffix.lower() in READERS:
        found = read_rows(path, text_column).texts
    else:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read as text in UTF-8: {error}") from None
        paragraphs = [p.strip() for p in text.replace("\r\n", "\n").split("\n\n")]
        found = paragraphs if sum(map(bool, paragraphs)) > 1 else text.splitlines()
    found = [document for document in found if document.strip()]
    if not found:
        raise DataError(f"{path} holds no text")
    return found
