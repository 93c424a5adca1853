"""Layouts: written by hand for the tiny models, and traced once for each structure."""

import re

from secateur.layout import Layout
from secateur.torch.host import TorchHost
from tests import zoo
from tests.torch.exact import randomize

HOSTS: dict[str, TorchHost] = {}


def host_of(name, **config):
    """A host of its own with random weights, of a model that is traced once in a run; config: numbers to be changed."""
    key = f"{name} {config}"
    if key not in HOSTS:
        model, example = zoo.structure(name, **config)
        HOSTS[key] = TorchHost(randomize(model), example)
    return HOSTS[key].copy()


# (pattern of a name, dimensions): L stands for the layer; the first pattern that matches counts
_RULES = {
    "bert": [
        (r"layer\.(\d+)\.attention\.self\.(query|key)\.weight", "(L.head L.qk) hidden"),
        (r"layer\.(\d+)\.attention\.self\.(query|key)\.bias", "(L.head L.qk)"),
        (r"layer\.(\d+)\.attention\.self\.value\.weight", "(L.head L.v) hidden"),
        (r"layer\.(\d+)\.attention\.self\.value\.bias", "(L.head L.v)"),
        (r"layer\.(\d+)\.attention\.output\.dense\.weight", "hidden (L.head L.v)"),
        (r"layer\.(\d+)\.intermediate\.dense\.weight", "L.ffn hidden"),
        (r"layer\.(\d+)\.intermediate\.dense\.bias", "L.ffn"),
        (r"layer\.(\d+)\.output\.dense\.weight", "hidden L.ffn"),
        (r"embeddings\.weight", "_ hidden"),
        (r"pooler\.dense\.weight", "pooled hidden"),
        (r"pooler\.dense\.bias", "pooled"),
        (r"classifier\.weight", "_ pooled"),
        (r"classifier\.bias", "_"),
    ],
    "llama": [
        (r"layers\.(\d+)\.self_attn\.q_proj\.weight", "(L.kv L.group L.qk) hidden"),
        (r"layers\.(\d+)\.self_attn\.k_proj\.weight", "(L.kv L.qk) hidden"),
        (r"layers\.(\d+)\.self_attn\.v_proj\.weight", "(L.kv L.v) hidden"),
        (r"layers\.(\d+)\.self_attn\.o_proj\.weight", "hidden (L.kv L.group L.v)"),
        (r"layers\.(\d+)\.mlp\.(gate|up)_proj\.weight", "L.ffn hidden"),
        (r"layers\.(\d+)\.mlp\.down_proj\.weight", "hidden L.ffn"),
        (r"embed_tokens\.weight", "vocab hidden"),
        (r"layers\.(\d+)\.mlp\.gate\.weight", "L.expert hidden"),
        (r"layers\.(\d+)\.mlp\.experts\.gate_up_proj", "L.expert (L.ffn + L.ffn) hidden"),
        (r"layers\.(\d+)\.mlp\.experts\.down_proj", "L.expert hidden L.ffn"),
        (r"lm_head\.weight", "vocab hidden"),
    ],
    "vit": [
        (r"layers\.(\d+)\.attention\.[qk]_proj\.weight", "(L.head L.qk) hidden"),
        (r"layers\.(\d+)\.attention\.[qk]_proj\.bias", "(L.head L.qk)"),
        (r"layers\.(\d+)\.attention\.v_proj\.weight", "(L.head L.v) hidden"),
        (r"layers\.(\d+)\.attention\.v_proj\.bias", "(L.head L.v)"),
        (r"layers\.(\d+)\.attention\.o_proj\.weight", "hidden (L.head L.v)"),
        (r"layers\.(\d+)\.mlp\.fc1\.weight", "L.ffn hidden"),
        (r"layers\.(\d+)\.mlp\.fc1\.bias", "L.ffn"),
        (r"layers\.(\d+)\.mlp\.fc2\.weight", "hidden L.ffn"),
        (r"cls_token|position_embeddings", "_ _ hidden"),
        (r"projection\.weight", "hidden _ _ _"),
        (r"classifier\.weight", "_ hidden"),
        (r"classifier\.bias", "_"),
    ],
    "gpt2": [
        (r"h\.(\d+)\.attn\.c_attn\.weight", "hidden (L.head L.qk + L.head L.qk + L.head L.v)"),
        (r"h\.(\d+)\.attn\.c_attn\.bias", "(L.head L.qk + L.head L.qk + L.head L.v)"),
        (r"h\.(\d+)\.attn\.c_proj\.weight", "(L.head L.v) hidden"),
        (r"h\.(\d+)\.mlp\.c_fc\.weight", "hidden L.ffn"),
        (r"h\.(\d+)\.mlp\.c_fc\.bias", "L.ffn"),
        (r"h\.(\d+)\.mlp\.c_proj\.weight", "L.ffn hidden"),
        (r"wte\.weight", "vocab hidden"),
        (r"wpe\.weight", "_ hidden"),
    ],
    "t5": [
        (r"(encoder|decoder)\.block\.(\d+)\.layer\.0\.SelfAttention\.[qk]\.weight", "(S.head L.qk) hidden"),
        (r"(encoder|decoder)\.block\.(\d+)\.layer\.0\.SelfAttention\.v\.weight", "(S.head L.v) hidden"),
        (r"(encoder|decoder)\.block\.(\d+)\.layer\.0\.SelfAttention\.o\.weight", "hidden (S.head L.v)"),
        (
            r"(encoder|decoder)\.block\.0\.layer\.0\.SelfAttention\.relative_attention_bias\.weight",
            "_ S.head",
        ),
        (r"(decoder)\.block\.(\d+)\.layer\.1\.EncDecAttention\.[qk]\.weight", "(S.xhead L.xqk) hidden"),
        (r"(decoder)\.block\.(\d+)\.layer\.1\.EncDecAttention\.v\.weight", "(S.xhead L.xv) hidden"),
        (r"(decoder)\.block\.(\d+)\.layer\.1\.EncDecAttention\.o\.weight", "hidden (S.xhead L.xv)"),
        (r"(encoder|decoder)\.block\.(\d+)\.layer\.\d\.DenseReluDense\.wi\.weight", "L.ffn hidden"),
        (r"(encoder|decoder)\.block\.(\d+)\.layer\.\d\.DenseReluDense\.wo\.weight", "hidden L.ffn"),
        (r"shared\.weight", "vocab hidden"),
    ],
}
_RULES["mixtral"] = _RULES["llama"]
_PATHS = {
    "bert": ["bert.encoder.layer"],
    "llama": ["model.layers"],
    "mixtral": ["model.layers"],
    "vit": ["vit.layers"],
    "gpt2": ["transformer.h"],
    "t5": ["encoder.block", "decoder.block"],
}


def layout_of(model):
    """The layout of one of the tiny models, or of any BERT for sequence classification."""
    config, family = model.config, model.config.model_type
    sizes = {"hidden": ("hidden", config.hidden_size), "pooled": ("pooled", config.hidden_size)}
    sizes["vocab"] = ("vocab", config.vocab_size if hasattr(config, "vocab_size") else 1)
    heads = config.num_attention_heads
    lines, tied, names = [], [], {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        if id(tensor) in names:
            tied.append(f"  {name} = {names[id(tensor)]}")
            continue
        names[id(tensor)] = name
        dims = "hidden" if tensor.dim() == 1 else " ".join("_" * tensor.dim())
        for pattern, found in _RULES[family]:
            match = re.search(pattern, name)
            if match:
                parts = match.groups()
                stack = parts[0] if parts and parts[0] in ("encoder", "decoder") else ""
                number = next((p for p in parts if p and p.isdigit()), "0")
                dims = found.replace("S.", f"{stack}.").replace("L.", f"{stack}L{number}.")
                break
        for dim, token in enumerate(dims.split()):
            if token == "_":
                dims = dims.replace("_", str(tensor.shape[dim]), 1)
        for axis in re.findall(r"[A-Za-z_][\w.]*", dims):
            kind = axis.rpartition(".")[2].removeprefix("x")
            if kind == "head":
                sizes[axis] = (kind, heads)
            elif kind == "kv":
                sizes[axis] = (kind, config.num_key_value_heads)
                prefix = axis.rpartition(".")[0]
                sizes[f"{prefix}.head"] = (f"head = {prefix}.kv {prefix}.group", heads)
            elif kind == "group":
                sizes[axis] = (kind, heads // config.num_key_value_heads)
            elif kind in ("qk", "v"):
                width = getattr(config, "d_kv", None) or getattr(config, "head_dim", None)
                sizes[axis] = (kind, width or config.hidden_size // heads)
            elif kind == "ffn":
                width = getattr(config, "d_ff", None) or getattr(config, "n_inner", None)
                sizes[axis] = (kind, width or config.intermediate_size)
            elif kind == "expert":
                sizes[axis] = (kind, config.num_local_experts)
        lines.append(f"  {name} : {dims}")
    for path in _PATHS[family]:
        name = "layers" if len(_PATHS[family]) == 1 else path.split(".")[0] + ".layers"
        sizes[name] = (f"layer @ {path}", len(model.get_submodule(path)))
    axes = []
    for name, (kind, size) in sizes.items():
        word, _, rest = kind.partition(" ")
        axes.append(f"  {name} {size} {word} {rest}".rstrip())
    return Layout.from_text("\n".join(["axes", *axes, "parameters", *lines, *(["tied", *tied] if tied else [])]))


# units that stay of some axes, another number in each layer
UNEVEN = {
    "bert": {"L0.head": [0, 2, 3], "L1.head": [1], "L0.ffn": range(0, 48, 2), "L2.ffn": range(10)},
    "llama": {
        "L0.head": [0, 1, 4, 5],
        "L0.kv": [0, 2],
        "L1.head": [0, 2, 4, 6],
        "L2.kv": [1, 2, 3],
        "L0.ffn": range(0, 48, 2),
        "L2.ffn": range(10),
    },
    "vit": {"L0.head": [0, 2, 3], "L1.head": [1], "L0.ffn": range(0, 48, 2), "L2.ffn": range(10)},
    "gpt2": {"L0.head": [0, 2, 3], "L1.head": [1], "L0.ffn": range(0, 48, 2), "L2.ffn": range(10)},
    "t5": {
        "encoder.head": [0, 2, 3],
        "decoder.head": [1],
        "decoder.xhead": [1, 2],
        "encoderL0.ffn": range(0, 48, 2),
        "decoderL1.ffn": range(10),
    },
    "mixtral": {"L0.head": [0, 1], "L0.kv": [0], "L0.ffn": range(8, 24), "L1.ffn": range(8), "L1.head": [0, 2]},
}
