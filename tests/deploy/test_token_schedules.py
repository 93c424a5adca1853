"""Models with a schedule of tokens exported, at shapes that the export did not see."""

from dataclasses import replace

import pytest
import torch

from secateur.deploy import target
from secateur.deploy.jobs.export import export
from tests import zoo
from tests.deploy.test_export import needs
from tests.torch.tokens import by_hand
from tests.torch.tokens.test_pruning import modernbert, padded, with_schedule

pytestmark = pytest.mark.slow
ANY_SHAPE = [pytest.param(name, marks=needs(name)) for name in ("onnx", "openvino")]


def texts(lengths, seed=0):
    ids, mask = padded(lengths, seed=seed)
    return {"input_ids": ids, "attention_mask": mask}


def differences(model, folder, batches):
    """Largest difference of the logits of each batch, relative to the largest logit."""
    program, found = target.load(folder), []
    for batch in batches:
        with torch.no_grad():
            expected = model(**batch).logits
        got = torch.tensor(program({name: value.numpy() for name, value in batch.items()})["logits"])
        found.append(float((got - expected).abs().max() / expected.abs().max()))
    return found


@pytest.mark.parametrize("to", ANY_SHAPE)
def test_a_pruned_text_model_takes_any_batch_and_length(tmp_path, to):
    model = with_schedule(zoo.bert(), "fast", by_hand.BERT)
    export(model, to, tmp_path / "a", example=texts([13, 9]))
    found = differences(model, tmp_path / "a", [texts([31]), texts([2, 1]), texts([40, 22, 3, 17, 40], seed=1)])
    assert max(found) < 1e-5


@pytest.mark.long
@needs("onnx")
def test_windows_and_rotary_positions_are_exported_too(tmp_path):
    model = with_schedule(modernbert(), "fast", by_hand.MODERNBERT)
    export(model, "onnx", tmp_path / "a", example=texts([13, 9]))
    found = differences(model, tmp_path / "a", [texts([31]), texts([5, 3]), texts([40, 22, 3, 17, 40], seed=1)])
    assert max(found) < 1e-5


@needs("onnx")
def test_merged_images_run_in_any_number(tmp_path):
    sites = replace(by_hand.VIT, stack="vit.layers")
    model = with_schedule(zoo.build("vit", image_size=32), [80, 60, 60], sites, method="merge")
    export(model, "onnx", tmp_path / "a", example={"pixel_values": torch.randn(2, 3, 32, 32)})
    batches = [{"pixel_values": torch.randn(count, 3, 32, 32)} for count in (1, 3, 6)]
    assert max(differences(model, tmp_path / "a", batches)) < 1e-5
