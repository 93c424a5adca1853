"""Plain text as documents: .txt by paragraph or line, tables and JSON lines by their text column."""

from pathlib import Path

from secateur.data.read import READERS, read_table, read_text
from secateur.errors import DataError


def read_documents(path: Path | str, text_column: str = "text") -> list[str]:
    """Documents of a file, in its order, without empty ones.

    A table has one document in each row. A file whose kind `secateur.data.read` does not know is read as plain text.

    Raises DataError for a file that does not exist, is no text, or has no document.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"no text at {path}")
    known = path.is_dir() or path.suffix.lower() in READERS
    cells = read_table(path).column(text_column) if known else read_text(path).column("text")
    documents = [str(cell) for cell in cells if cell is not None and str(cell).strip()]
    if not documents:
        raise DataError(f"{path} holds no text")
    return documents
