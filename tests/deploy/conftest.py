"""A tiny classifier with its tokenizer, cut to another size in every layer, and artefacts of it."""

import numpy as np
import pytest

import secateur

from ..text_models import write_classifier, write_texts


@pytest.fixture(scope="session")
def classifier(tmp_path_factory):
    return write_classifier(tmp_path_factory.mktemp("dense") / "dense", layers=2)


@pytest.fixture(scope="session")
def uneven(tmp_path_factory, classifier):
    from secateur.torch.data.text_rows import load_tokenizer

    host = secateur.open(classifier)
    first, second = host.layout.of_kind("head")
    up, down = host.layout.of_kind("ffn")
    plan = secateur.Plan(
        {first.name: np.array([0, 2, 3]), second.name: np.array([1]), up.name: np.arange(20), down.name: np.arange(48)}
    ).check(host.layout)
    host.resize(plan)
    folder = tmp_path_factory.mktemp("uneven") / "uneven"
    host.save(folder, plan, tokenizer=load_tokenizer(classifier))
    return folder


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    from secateur.data.read import read_table

    return read_table(write_texts(tmp_path_factory.mktemp("rows") / "rows.csv", rows=30))


@pytest.fixture(scope="session")
def artefact(tmp_path_factory, uneven, rows):
    """The uneven classifier for ONNX Runtime, and what `export` said of it."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from secateur.deploy import export

    return export(uneven, "onnx", tmp_path_factory.mktemp("onnx") / "artefact", data=rows)
