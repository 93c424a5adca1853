"""A tiny classifier and texts for it; nothing is trained."""

import pytest

from tests.text_models import write_classifier, write_texts


@pytest.fixture(scope="package")
def classifier(tmp_path_factory):
    import pandas  # noqa: F401  # all that a command needs is loaded here, so that no forked child has to

    import secateur
    import secateur.torch.train.callback  # noqa: F401

    folder = write_classifier(tmp_path_factory.mktemp("model") / "model")
    secateur.open(str(folder))
    return folder


@pytest.fixture(scope="package")
def data(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("data") / "rows.csv", 40)


@pytest.fixture
def place(tmp_path):
    """The folder in which the output is to appear."""
    folder = tmp_path / "place"
    folder.mkdir()
    return folder
