"""Tiny images and sounds whose label or words can be seen or heard, and tiny models that read them, as folders."""

import json
import wave

import numpy as np

from tests import zoo

COLOURS = {"blue": (20, 30, 220), "green": (30, 200, 40), "red": (220, 30, 20)}
RATE = 16000
"""Samples of a second."""
PITCHES = {"high": 3000.0, "low": 300.0, "middle": 1000.0}
LETTERS = "abc"
"""Each is a tone of its own."""
TONES = dict(zip(LETTERS, (400.0, 1200.0, 3200.0), strict=True))


# -- images -----------------------------------------------------------------------------------------------------------


def picture(colour, size, rng):
    """A square of that colour somewhere on a gray ground, as an array (height, width, 3)."""
    width, height = size
    pixels = rng.integers(90, 150, (height, width, 3)).astype(np.uint8)
    side = min(size) // 2
    x, y = rng.integers(0, width - side + 1), rng.integers(0, height - side + 1)
    pixels[y : y + side, x : x + side] = colour
    return pixels


def write_images(folder, rows=12, seed=0, splits=()):
    """PNGs of different sizes in a folder for each colour; with `splits`, such a folder in each of them."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    for split in splits or (".",):
        for i in range(rows):
            name = sorted(COLOURS)[i % len(COLOURS)]
            place = folder / split / name
            place.mkdir(parents=True, exist_ok=True)
            size = tuple(rng.integers(16, 40, 2))
            Image.fromarray(picture(COLOURS[name], size, rng)).save(place / f"{i}.png")
    return folder


def write_image_model(folder, cls="ViTForImageClassification", size=16, seed=0, **options):
    """A ViT of width 32 with an image processor."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config |= {"image_size": 16, "patch_size": 8, "num_labels": 3, "initializer_range": 0.1}
    getattr(transformers, cls)(transformers.ViTConfig(**{**config, **options})).eval().save_pretrained(folder)
    transformers.ViTImageProcessorPil(size={"height": size, "width": size}).save_pretrained(folder)
    return folder


# -- sounds -----------------------------------------------------------------------------------------------------------


def tone(pitch, seconds, rng):
    """A sine of that pitch with some noise, in float32."""
    times = np.arange(int(seconds * RATE)) / RATE
    samples = 0.6 * np.sin(2 * np.pi * pitch * times + rng.uniform(0, 6)) + 0.02 * rng.standard_normal(len(times))
    return samples.astype(np.float32)


def write_wav(path, samples, rate=RATE):
    """Samples (time,) or (time, channels) in -1..1 as a WAV of 16 bits."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
    return path


def write_sounds(folder, rows=12, seed=0, seconds=(0.3, 0.5)):
    """WAVs of different lengths in a folder for each pitch."""
    rng = np.random.default_rng(seed)
    for i in range(rows):
        name = sorted(PITCHES)[i % len(PITCHES)]
        (folder / name).mkdir(parents=True, exist_ok=True)
        write_wav(folder / name / f"{i}.wav", tone(PITCHES[name], rng.uniform(*seconds), rng))
    return folder


def write_speech(folder, rows=12, seed=0, letters=(2, 4), seconds=0.12):
    """WAVs and a CSV of `file,text`: each letter of a text is a tone of its own, a space is silence."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["file,text"]
    for i in range(rows):
        text = "".join(rng.choice(list(LETTERS), rng.integers(letters[0], letters[1] + 1)))
        text = f"{text[:1]} {text[1:]}" if i % 2 else text
        write_wav(folder / f"{i}.wav", np.concatenate([_letter(c, seconds, rng) for c in text]))
        lines.append(f"{i}.wav,{text}")
    path = folder / "speech.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def _letter(letter, seconds, rng):
    """The tone of a letter, which swells and fades; a space is silent."""
    sound = tone(TONES.get(letter, 0.0), seconds, rng) * np.hanning(int(seconds * RATE))
    return 0 * sound if letter == " " else sound


WAV2VEC2 = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": (16, 16, 16),
    "conv_kernel": (10, 8, 5),
    "conv_stride": (8, 8, 5),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "layerdrop": 0.0,
    "mask_time_prob": 0.0,
    "classifier_proj_size": 24,
    "ctc_loss_reduction": "sum",
    "pad_token_id": 0,
}
"""A Wav2Vec2 whose frames are 20 ms apart, and which reads attention masks."""


def write_sound_model(folder, cls="Wav2Vec2ForSequenceClassification", seed=0, extractor=None, **options):
    """A Wav2Vec2 (or the model of another class, with its config in `options`) with a feature extractor."""
    import torch
    import transformers

    torch.manual_seed(seed)
    kind = getattr(transformers, cls)
    usual = {**WAV2VEC2, "num_labels": 3} if issubclass(kind.config_class, transformers.Wav2Vec2Config) else {}
    kind(kind.config_class(**{**usual, **options})).eval().save_pretrained(folder)
    extractor = extractor or transformers.Wav2Vec2FeatureExtractor(sampling_rate=RATE, return_attention_mask=True)
    extractor.save_pretrained(folder)
    return folder


def write_ctc_model(folder, seed=0, **options):
    """A Wav2Vec2ForCTC with a feature extractor and a tokenizer of `LETTERS`."""
    import transformers

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, **{c: 5 + i for i, c in enumerate(LETTERS)}}
    write_sound_model(folder, "Wav2Vec2ForCTC", seed, vocab_size=len(words), **options)
    (folder / "vocab.json").write_text(json.dumps(words))
    transformers.Wav2Vec2CTCTokenizer(folder / "vocab.json").save_pretrained(folder)
    return folder


def letter_tokenizer():
    """A tokenizer of single letters; every text begins with [START] and ends with [END], which also pads."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[END]", "[START]", "[UNK]", " ", *LETTERS]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    raw.decoder = decoders.Fuse()
    raw.post_processor = processors.TemplateProcessing(
        single="[START] $A [END]", special_tokens=[("[START]", 1), ("[END]", 0)]
    )
    special = {"pad_token": "[END]", "eos_token": "[END]", "bos_token": "[START]", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, **special)


def write_whisper(folder, cls="WhisperForConditionalGeneration", seed=0, **options):
    """A Whisper that hears one second, with a feature extractor and a tokenizer of `LETTERS`."""
    import transformers

    tokenizer = letter_tokenizer()
    config = {**zoo.both_sides(2, 4, 48), "d_model": 32, "num_mel_bins": 8, "max_source_positions": 50}
    config |= {"vocab_size": len(tokenizer), "max_target_positions": 16, "decoder_start_token_id": 1}
    config |= {"pad_token_id": 0, "eos_token_id": 0, "bos_token_id": 1, "init_std": 0.1}
    config |= {"suppress_tokens": [], "begin_suppress_tokens": []}
    extractor = transformers.WhisperFeatureExtractor(feature_size=8, sampling_rate=RATE, chunk_length=1)
    write_sound_model(folder, cls, seed, extractor, **{**config, **options})
    tokenizer.save_pretrained(folder)
    return folder
