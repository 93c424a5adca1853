"""Plain text as documents: .txt by paragraph or line, tables and JSON lines by their text column."""

from pathlib import Path

from secateur.errors import DataError
from secateur.labelled_rows import READERS, read_rows


def read_documents(path: Path | str, text_column: str = "text") -> list[str]:
    """Documents of a file, in its order, without empty ones.

    A file of a kind that `secateur.labelled_rows` reads has one document in each row. Any other file is plain text in
    UTF-8, in which empty lines separate documents; where there are no empty lines, each line is one.

    Raises DataError for a file that does not exist, is no text, or has no document.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"no text at {path}")
    if path.is_dir() or path.suffix.lower() in READERS:
        documents = read_rows(path, text_column).texts
    else:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read as text in UTF-8: {error}") from None
        paragraphs = [p.strip() for p in text.replace("\r\n", "\n").split("\n\n")]
        documents = paragraphs if sum(map(bool, paragraphs)) > 1 else text.splitlines()
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise DataError(f"{path} holds no text")
    return documents
