"""Twenty decoders with other sizes in each layer on llama.cpp: sizes that it is known to compute wrongly or to refuse
where a file says them plainly, random sizes, and random plans of secateur.

Every model is written in float32 with the neurons of zeros that a format with blocks wants, and without. Both files
must give PyTorch's log probabilities, and one of them PyTorch's greedy tokens.
"""

import numpy as np
import pytest

import secateur
from secateur.deploy.gguf import quantise
from secateur.deploy.gguf.compare import compare
from secateur.deploy.gguf.decoder import decoder_of
from secateur.deploy.gguf.export import FILE
from secateur.deploy.gguf.llama_cpp import running
from secateur.deploy.gguf.vocabulary import vocabulary_of
from secateur.deploy.gguf.write import sizes_of, write

from .models import TEXTS, byte_level, cut, decoder, greedy

pytest.importorskip("gguf", reason="the extra gguf is not installed")
pytest.importorskip("xllamacpp", reason="the extra gguf is not installed")
pytestmark = pytest.mark.long

FAMILIES = ("Llama", "Mistral", "Qwen2")
TRAPS = {
    "few neurons": [(4, 1), (3, 48), (4, 48), (1, 3)],
    "no neurons at both ends": [(4, 0), (3, 33), (2, 7), (1, 0)],
    "no neurons anywhere": [(4, 0), (1, 0), (2, 0), (3, 0)],
    "one group in the first layer": [(1, 48), (4, 48), (4, 48), (4, 48)],
    "no attention in the first layer": [(0, 40), (4, 1), (0, 17), (2, 48)],
    "attention in the last layer alone": [(0, 48), (0, 31), (0, 0), (3, 32)],
}
"""(key-value heads of 4, neurons of 48) in each layer."""


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level()


def made(family, seed=0, **options):
    """A random model of four layers with eight heads on four key-value heads."""
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    return decoder(family, layers=4, **heads, tie_word_embeddings=bool(seed % 2), **options)


def check(model, tokenizer, folder):
    """llama.cpp computes what PyTorch computes, with and without the zeros that blocks want."""
    read, exact = decoder_of(model), quantise.FORMATS["f32"]
    vocabulary = vocabulary_of(tokenizer, read.vocabulary)
    for form in ("f32", "q4_0"):
        file = folder / f"{form}-{FILE}"
        write(file, form, read, vocabulary, exact, sizes_of(read, quantise.FORMATS[form]))
        found = compare(file, model, tokenizer, read.context)
        assert found.relative_error < 1e-4
        assert found.agreement == 1.0
    prompt = tokenizer(TEXTS[2])["input_ids"]
    with running(file, read.context) as llama:
        assert llama.complete(prompt, 8).tokens == greedy(model, prompt, 8)
    return read


@pytest.mark.parametrize("name", TRAPS)
def test_traps(name, tokenizer, tmp_path):
    number = list(TRAPS).index(name)
    read = check(cut(made(FAMILIES[number % 3], number), TRAPS[name]), tokenizer, tmp_path)
    assert [(layer.kv, layer.ffn) for layer in read.layers] == TRAPS[name]


@pytest.mark.parametrize("seed", range(6))
def test_random_sizes(seed, tokenizer, tmp_path):
    rng = np.random.default_rng(seed)
    sizes = [(int(rng.integers(0, 5)), int(rng.integers(0, 49))) for _ in range(4)]
    sizes[int(rng.integers(4))] = (int(rng.integers(1, 5)), 0)
    check(cut(made(FAMILIES[seed % 3], seed), sizes), tokenizer, tmp_path)


@pytest.fixture(scope="module")
def hosts():
    """A traced model of each family."""
    return [secateur.open(made(family, number)) for number, family in enumerate(FAMILIES)]


@pytest.mark.parametrize("seed", range(8))
def test_random_plans(seed, hosts, tokenizer, tmp_path):
    """Any groups, query heads, neurons, dimensions of the heads and layers go, as a user's plan has them."""
    rng, host = np.random.default_rng(seed), hosts[seed % 3].copy()
    layout = host.layout
    (layers,) = layout.of_kind("layer")
    keep = {layers.name: some(rng, layers.size, layers.size - 1)} if seed % 4 == 3 else {}
    for groups, heads, neurons in zip(*(layout.of_kind(kind) for kind in ("kv", "head", "ffn")), strict=True):
        keep[groups.name] = some(rng, 4, int(rng.integers(1, 5)))
        count = int(rng.integers(1, 3))
        keep[heads.name] = np.concatenate([2 * group + some(rng, 2, count) for group in keep[groups.name]])
        keep[neurons.name] = some(rng, 48, int(rng.integers(1, 49)))
    if narrow := seed in (4, 7):  # llama.cpp takes one size of all heads; queries and keys go in pairs
        keep |= {axis.name: some(rng, axis.size, 6) for axis in layout.of_kind("v")}
        keep |= {axis.name: some(rng, axis.size, 3) for axis in layout.of_kind("qk")}
    host.resize(secateur.Plan(keep).check(layout))
    read = check(host.model, tokenizer, tmp_path)
    assert (read.key, read.value) == ((6, 6) if narrow else (8, 8))
    assert len(read.layers) == (3 if seed % 4 == 3 else 4)


def some(rng, size, count):
    """Random units, ascending."""
    return np.sort(rng.permutation(size)[:count])
