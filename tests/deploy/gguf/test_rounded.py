"""A model with the matrices of a GGUF file, without the file: the same numbers, and the same bytes."""

import copy
import math

import numpy as np
import pytest
import torch

from secateur.deploy.gguf import quantise
from secateur.deploy.gguf.decoder import decoder_of, tensors
from secateur.deploy.gguf.export import FILE, write_for_times
from secateur.deploy.gguf.rounded import round_weights
from secateur.deploy.gguf.write import sizes_of
from secateur.deploy.target import DeployError

from ... import zoo
from .models import byte_level, cut, decoder

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
pytest.importorskip("xllamacpp", reason="the extra gguf is not installed")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("form", ["q8_0", "q4_0", "q4_k_m"])
def test_it_has_the_numbers_and_the_bytes_of_the_file(form, tied, tmp_path):
    sizes = [(2, 40), (1, 17), (0, 33)]  # heads whose rows fit no block, neurons that are filled up, no attention
    model = cut(decoder(tie_word_embeddings=tied), sizes)
    file = write_for_times(model, byte_level(), tmp_path / "made", quantize=form) / FILE
    size = round_weights(model, form)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    assert size == sum(tensor.n_bytes for tensor in found.values())
    written = decoder_of(model)
    ours = dict(tensors(written, sizes_of(written, quantise.find(form))))
    assert set(ours) == set(found)
    for name, tensor in found.items():
        given = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(given, ours[name].detach().numpy()), name


def test_eight_bits_by_hand():
    model = decoder(layers=1)
    row = model.model.layers[0].mlp.up_proj.weight[0].detach().clone()  # one block of 32
    scale = float(np.float16(row.abs().max() / 127))
    round_weights(model, "q8_0")
    rounded = model.model.layers[0].mlp.up_proj.weight[0]
    assert not torch.equal(rounded, row)
    assert (rounded - row).abs().max() <= scale * 0.51
    assert torch.allclose(rounded / scale, (rounded / scale).round(), atol=1e-4)


def test_vectors_stay_and_half_precision_is_half_precision():
    model = decoder(layers=1)
    before = copy.deepcopy(model)
    assert round_weights(model, "f16") > 2 * sum(p.numel() for p in model.parameters())
    for name, parameter in before.named_parameters():
        expected = parameter.half().float() if parameter.ndim == 2 else parameter
        assert torch.equal(model.get_parameter(name), expected), name


def test_a_model_that_gguf_cannot_hold_is_rounded_too():
    model = zoo.build("gpt2")
    before = copy.deepcopy(model)
    size = round_weights(model, "q8_0")
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before.get_parameter(n))}
    assert changed == {n for n, p in model.named_parameters() if p.ndim == 2}
    shapes = [p.shape for p in model.parameters()]
    bits = [32 if len(s) == 1 else 8.5 if s[-1] % 32 == 0 else 16 for s in shapes]
    assert size == round(sum(math.prod(s) * b for s, b in zip(shapes, bits, strict=True)) / 8)


def test_a_format_that_is_not_there():
    with pytest.raises(DeployError, match="no format 'q3' for GGUF; there is f32, f16"):
        round_weights(decoder(layers=1), "q3")
