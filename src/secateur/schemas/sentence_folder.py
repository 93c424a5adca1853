"""What is read of a sentence-transformers folder: `modules.json`, and the configs of what follows the transformer."""

import re
from pathlib import Path
from typing import Any

from pydantic import Field, TypeAdapter, ValidationError

from secateur.errors import ModelError, shown
from secateur.schemas.model_folder import LONGEST_NAME, REMEDY, Known
from secateur.schemas.reading import check, read_json, read_value

MODULES = "modules.json"
PROMPTS = "config_sentence_transformers.json"
TRANSFORMER = "sentence_*_config.json"
"""The settings of the transformer's module; the name of the file has that of the architecture in it."""

_INSIDE = re.compile(r"(?!\.\.?$)[\w. -]*")
"""The name of a folder in the folder of the model; empty for that folder itself."""


class Module(Known):
    """An entry of `modules.json`, the list of what a text goes through.

    type: the class; its last word says what the module does. path: its folder, in the folder of the model.
    """

    type: str
    path: str = ""


class Text(Known):
    """`sentence_bert_config.json`.

    max_seq_length: the longest text in tokens. do_lower_case: whether texts lose their case.
    """

    max_seq_length: int | None = Field(default=None, ge=1)
    do_lower_case: bool | None = False


class Prompts(Known):
    """`config_sentence_transformers.json`.

    prompts: name -> what is put before a text. default_prompt_name: which one is put where nobody names one.
    """

    prompts: dict[str, str | None] | None = None
    default_prompt_name: str | None = None


class Pooling(Known):
    """`1_Pooling/config.json`: how token vectors become one; several ways stand one after the other in it.

    pooling_mode: the ways by name, as newer folders have them; older ones have a flag for each.
    include_prompt: whether the tokens of a prompt count.
    """

    pooling_mode: str | list[str] | None = None
    pooling_mode_cls_token: bool = False
    pooling_mode_max_tokens: bool = False
    pooling_mode_mean_tokens: bool = False
    pooling_mode_mean_sqrt_len_tokens: bool = False
    pooling_mode_weightedmean_tokens: bool = False
    pooling_mode_lasttoken: bool = False
    include_prompt: bool = True


class Dense(Known):
    """`2_Dense/config.json`: a linear layer after the pooling.

    activation_function: a class of `torch.nn`, with its path. use_residual: whether the input is added to the result.
    """

    in_features: int = Field(ge=1, lt=2**20)
    out_features: int = Field(ge=1, lt=2**20)
    bias: bool = True
    activation_function: str = "torch.nn.modules.activation.Tanh"
    use_residual: bool = False


def read_modules(folder: Path) -> list[Module]:
    """What a text goes through in this folder, empty where there is no `modules.json`.

    Raises ModelError when the file is damaged, or names a folder outside its own.
    """
    path = folder / MODULES
    if not path.is_file():
        return []
    value = read_value(path, remedy=REMEDY)
    try:
        modules = TypeAdapter(list[Module]).validate_python(value, strict=True)
    except ValidationError as problem:
        first = problem.errors(include_url=False)[0]
        raise ModelError(
            f"{path} is damaged: {shown(first.get('input'), 60)} ({first['msg'].lower()}); {REMEDY}"
        ) from None
    for module in modules:
        if len(module.path) > LONGEST_NAME:
            raise ModelError(f"{path} names a folder of more than {LONGEST_NAME} characters; {REMEDY}")
        if not _INSIDE.fullmatch(module.path):
            raise ModelError(f"{path} points outside its folder, to {shown(module.path)}; it is not to be trusted")
    return modules


def read_module_config(folder: Path, module: Module) -> dict[str, Any]:
    """All of the `config.json` of a module; empty where it has none."""
    path = folder / module.path / "config.json"
    return read_json(path, remedy=REMEDY) if module.path and path.is_file() else {}


def read_text_settings(folder: Path) -> Text:
    """How long texts may be, and whether their case counts."""
    path = next(iter(sorted(folder.glob(TRANSFORMER))), None)
    return Text() if path is None else check(read_json(path, remedy=REMEDY), Text, str(path), remedy=REMEDY)


def read_prompt(folder: Path) -> str:
    """What is put before every text; mostly nothing."""
    path = folder / PROMPTS
    if not path.is_file():
        return ""
    read = check(read_json(path, remedy=REMEDY), Prompts, str(path), remedy=REMEDY)
    if read.default_prompt_name is None:
        return ""
    if read.default_prompt_name not in (read.prompts or {}):
        raise ModelError(f"{path} names the prompt {shown(read.default_prompt_name)}, which it does not hold; {REMEDY}")
    return (read.prompts or {})[read.default_prompt_name] or ""
