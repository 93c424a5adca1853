"""Tiny BERTs that tag words or answer questions, with a tokenizer, and data whose rules they learn in seconds."""

import json
import random

FIRST = ["ann", "bob", "eve", "tom", "mia", "max"]
LAST = ["smith", "brown", "jones", "lee"]
PLACES = ["paris", "rome", "oslo", "lima", "cairo", "delhi"]
PLAIN = ["the", "a", "bus", "left", "soon", "and", "came", "back", "with", "two", "books", "today"]
TAGS = ["O", "B-LOC", "B-PER", "I-PER"]
VOCABULARY = [*FIRST, *LAST, *PLACES, *PLAIN, "in", "where", "##s", "##ville", "."]


def write_lines(path, rows):
    """Objects as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tagged(count, seed=0):
    """Sentences with tags: words of FIRST are B-PER, words of LAST I-PER, places B-LOC, in the form of CoNLL.

    Some words take two tokens: `annville` and `annas` are tagged as `ann` is.
    """
    rng = random.Random(seed)
    for _ in range(count):
        words, tags = [], []
        for _ in range(rng.randint(3, 7)):
            kind = rng.choice(["plain", "plain", "plain", "person", "place"])
            if kind == "person":
                words += [rng.choice(FIRST), rng.choice(LAST)]
                tags += ["B-PER", "I-PER"]
            else:
                words.append(rng.choice(PLAIN if kind == "plain" else PLACES) + rng.choice(["", "", "s"]))
                tags.append("O" if kind == "plain" else "B-LOC")
        yield {"tokens": words, "tags": tags}


def questions(count, seed=0, *, impossible=0.0):
    """Questions `where` NAME, whose answer is the word after `in`, in the form of SQuAD; other places are no answers.

    impossible: share of the contexts without `in`, where there is no answer.
    """
    rng = random.Random(seed)
    for i in range(count):
        name, (place, other) = rng.choice(FIRST), rng.sample(PLACES, 2)
        is_possible = rng.random() >= impossible
        parts = [f"{name} {'in ' if is_possible else ''}{place}", other, *rng.choices(PLAIN, k=rng.randint(2, 6))]
        rng.shuffle(parts)
        context = " ".join(parts)
        found = [context.index("in ") + 3] if is_possible else []
        answers = {"text": [place] * len(found), "answer_start": found}
        yield {"id": str(i), "question": f"where {name}", "context": context, "answers": answers}


def word_pieces():
    """A fast tokenizer that cuts words into pieces of VOCABULARY, with [CLS] and [SEP] around texts and pairs."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    raw = Tokenizer(models.WordPiece({w: i for i, w in enumerate([*special, *VOCABULARY])}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def bert(cls, layers=2, seed=0, **options):
    """A random BERT of width 32 with four heads for the vocabulary of `word_pieces`."""
    import torch
    import transformers

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4, "intermediate_size": 64}
    sizes |= {"vocab_size": len(VOCABULARY) + 4, "max_position_embeddings": 64, "hidden_dropout_prob": 0.0}
    config = transformers.BertConfig(**{**sizes, "attention_probs_dropout_prob": 0.0, **options})
    return getattr(transformers, cls)(config).eval()


def write_model(folder, cls, **options):
    """A random BERT and its tokenizer as a folder."""
    bert(cls, **options).save_pretrained(folder)
    word_pieces().save_pretrained(folder)
    return folder


def write_tagger(folder, **options):
    """A random tagger whose head knows TAGS."""
    names = {"id2label": dict(enumerate(TAGS)), "label2id": {tag: i for i, tag in enumerate(TAGS)}}
    return write_model(folder, "BertForTokenClassification", **{**names, **options})


def write_answerer(folder, **options):
    """A random model that answers questions."""
    return write_model(folder, "BertForQuestionAnswering", **options)
