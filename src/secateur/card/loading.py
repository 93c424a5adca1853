"""How a folder is opened, as Python that runs inside it: the class by the task, and `import secateur` where it is
needed.
"""

from secateur.card.facts import Facts

AUTO = {
    "text-classification": ("SequenceClassification",),
    "token-classification": ("TokenClassification",),
    "question-answering": ("QuestionAnswering",),
    "image-classification": ("ImageClassification",),
    "audio-classification": ("AudioClassification",),
    "automatic-speech-recognition": ("CTC", "SpeechSeq2Seq"),
    "text2text-generation": ("Seq2SeqLM",),
    "text-generation": ("CausalLM",),
    "fill-mask": ("MaskedLM",),
}
"""Task -> names after `AutoModelFor` of classes that open its models; the last where the architecture names none."""
PROCESSORS = {
    "image-classification": "AutoImageProcessor",
    "audio-classification": "AutoFeatureExtractor",
    "automatic-speech-recognition": "AutoProcessor",
}


def loading(task: str | None, facts: Facts) -> str:
    """Python that opens the model. task: a name of `AUTO`; of another or no task the class of the config opens it."""
    if facts.opens == "plain":
        return (
            "import secateur\n\nfresh = Model()  # your class, made as for the model that was pruned\n"
            'model = secateur.load(".", model=fresh)  # this folder'
        )
    first = [] if facts.opens == "stock" else ["import secateur"]
    trusted = ", trust_remote_code=True" if facts.has_code else ""
    if facts.is_sentence:
        return "\n".join(
            [
                *first,
                "from sentence_transformers import SentenceTransformer\n",
                f'model = SentenceTransformer("."{trusted})  # this folder, or its name on the hub',
            ]
        )
    names = {"model": auto_class(task, facts)}
    if facts.has_processor and task in PROCESSORS:
        names["processor"] = PROCESSORS[task]
    elif facts.has_tokenizer:
        names["tokenizer"] = "AutoTokenizer"
    lines = [f"{variable} = {name}.from_pretrained(folder{trusted})" for variable, name in names.items()]
    imported = f"from transformers import {', '.join(sorted(names.values()))}\n"
    return "\n".join([*first, imported, 'folder = "."  # this folder, or its name on the hub', *lines])


def auto_class(task: str | None, facts: Facts) -> str:
    """The class of transformers that opens the model."""
    architecture = facts.architecture or ""
    suffix = architecture.rpartition("For")[2] if "For" in architecture else ""
    suffixes = [name for group in AUTO.values() for name in group]
    if task in AUTO:
        fitting = AUTO[task]
        return f"AutoModelFor{suffix if suffix in fitting else fitting[-1]}"
    if suffix in suffixes:
        return f"AutoModelFor{suffix}"
    return "AutoModel" if facts.has_code or not architecture else architecture
