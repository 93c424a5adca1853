"""Fine-tuning with transformers' Trainer and held zeros, the same way for dense and pruned models."""

import math
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoConfig

from secateur.errors import DataError
from secateur.labelled_rows import Rows
from secateur.plan import Plan
from secateur.torch.base import remote_code
from secateur.torch.host import TorchHost
from secateur.torch.train.callback import Bar, Hold, Holding
from secateur.torch.train.distil_loss import distillation_loss


def fine_tune(
    host: TorchHost,
    features: Sequence[dict[str, Any]],
    tokenizer: Any,
    *,
    plan: Plan | None = None,
    epochs: float = 1.0,
    learning_rate: float = 1e-4,
    batch_size: int = 32,
    weight_decay: float = 0.01,
    seed: int = 0,
    teacher: nn.Module | None = None,
    callbacks: Sequence[Any] = (),
    progress: bool = True,
) -> float:
    """Train `host.model` in place on encoded rows (see `text_rows.encode`); returns the last mean loss.

    plan: zeros to hold during training, in addition to those of `host.plan`.
    teacher: the dense model to learn from, in addition to labels (see `secateur.torch.train.distil_loss`).
    callbacks: more callbacks for the Trainer.
    progress: whether a progress bar is shown.

    AdamW, linear decay, 6% warm-up, gradient norm 1.

    Raises:
        DataError: when `epochs` or the learning rate is no positive number, or the loss is NaN or infinite.
    """
    # Optional: Trainer imports packages of the extra `train` (accelerate, datasets).
    from transformers import DataCollatorWithPadding, PrinterCallback, Trainer, TrainingArguments

    for value, option in ((epochs, "epochs"), (learning_rate, "the learning rate")):
        if not 0 < value < float("inf"):
            raise DataError(f"{option} must be a positive number, not {value}")
    steps = max(1, round(epochs * -(-len(features) // batch_size)))
    hold = Hold(host, plan or Plan()) if plan is not None or host.plan is not None else None
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=steps,
            learning_rate=learning_rate,
            per_device_train_batch_size=batch_size,
            weight_decay=weight_decay,
            optim="adamw_torch_fused",
            warmup_steps=max(1, round(0.06 * steps)),
            train_sampling_strategy="group_by_length",
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            logging_nan_inf_filter=False,
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        trainer = (Trainer if teacher is None else _distilling(teacher))(
            model=host.model,
            args=arguments,
            train_dataset=features,
            data_collator=DataCollatorWithPadding(tokenizer),
            callbacks=[*callbacks, *([hold] if hold is not None else []), *([Bar()] if progress else [])],
        )
        trainer.remove_callback(PrinterCallback)
        try:
            loss = trainer.train().training_loss
        finally:
            for callback in (hold, *callbacks):
                if isinstance(callback, Holding):
                    callback.close()
            _forget_gradients(host.model)
    if not math.isfinite(loss) or not all(bool(p.isfinite().all()) for p in host.model.parameters()):
        raise DataError(
            f"training diverged (mean loss {loss}); lower the learning rate ({learning_rate}) or check the labels"
        )
    host.model.eval()
    return loss


def _distilling(teacher: nn.Module) -> Any:
    """A Trainer whose loss is the distillation loss."""
    from transformers import Trainer  # optional, as in `fine_tune`

    teacher.eval()

    class Distilling(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *, return_outputs: bool = False, **kwargs: Any) -> Any:
            loss, output = distillation_loss(model, teacher, inputs)
            return (loss, output) if return_outputs else loss

    return Distilling


def classifier_options(source: Any, rows: Rows, seed: int, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Options for loading `source` as a classifier of the labels in `rows`.

    A folder that is a classifier keeps its head; other folders get a new head (drawn with `seed`), whose classes are
    the sorted labels.
    """
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=remote_code.stated(trust_remote_code))
    except ValueError as error:
        remote_code.check(source, error)
        raise
    torch.manual_seed(seed)
    classifier = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
    if classifier is not None and classifier.__name__ in (config.architectures or ()):
        return {}
    names = sorted({str(label) for label in rows.labels or ()})
    if len(names) < 2:
        raise DataError(f"a classifier needs at least two labels; the data has {', '.join(names) or 'none'}")
    return {
        "num_labels": len(names),
        "label2id": {name: i for i, name in enumerate(names)},
        "id2label": dict(enumerate(names)),
    }


def _forget_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None
