"""Fine-tuning with transformers' Trainer and held zeros, the same way for dense and pruned models."""

import math
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from secateur.errors import DataError
from secateur.plan import Plan
from secateur.tasks.base.task import Examples, Task
from secateur.torch.base.batches import LABELS
from secateur.torch.base.batches import arguments as called_with
from secateur.torch.host import TorchHost
from secateur.torch.train.callback import Bar, Hold, Holding
from secateur.torch.train.distil_loss import distillation_loss


def fine_tune(
    host: TorchHost,
    task: Task,
    examples: Examples,
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
    arguments: Mapping[str, Any] | None = None,
) -> float:
    """Train `host.model` in place on encoded rows; returns the last mean loss.

    Rows without labels need a teacher.

    plan: zeros to hold during training, in addition to those of `host.plan`.
    teacher: the dense model to learn from, in addition to labels where there are any (see
        `secateur.torch.train.distil_loss`).
    arguments: more fields of transformers' TrainingArguments, which win over what is chosen here.
    callbacks: more callbacks for the Trainer.
    progress: whether a progress bar is shown.

    AdamW, linear decay, 6% warm-up, gradient norm 1.

    Raises:
        DataError: when `epochs` or the learning rate is no positive number, or the loss is NaN or infinite.
    """
    # Optional: Trainer imports packages of the extra `train` (accelerate, datasets).
    from transformers import PrinterCallback, TrainingArguments

    for value, option in ((epochs, "epochs"), (learning_rate, "the learning rate")):
        if not 0 < value < float("inf"):
            raise DataError(f"{option} must be a positive number, not {value}")
    features = list(examples.features)
    if teacher is None and set(LABELS).isdisjoint(features[0]):
        raise DataError("training needs labels; name their column, or learn from the dense model alone with --distil")
    steps = max(1, round(epochs * -(-len(features) // batch_size)))
    hold = Hold(host, plan or Plan()) if plan is not None or host.plan is not None else None
    with tempfile.TemporaryDirectory() as scratch:
        chosen: dict[str, Any] = {
            "output_dir": scratch,
            "max_steps": steps,
            "learning_rate": learning_rate,
            "per_device_train_batch_size": batch_size,
            "weight_decay": weight_decay,
            "optim": "adamw_torch_fused",
            "warmup_steps": max(1, round(0.06 * steps)),
            "train_sampling_strategy": "group_by_length" if "input_ids" in features[0] else "random",
            "seed": seed,
            "save_strategy": "no",
            "logging_strategy": "no",
            "logging_nan_inf_filter": False,
            "report_to": [],
            "disable_tqdm": True,
            "dataloader_pin_memory": torch.cuda.is_available(),
            "remove_unused_columns": False,
        }
        trainer = _trainer_class(task, teacher)(
            model=host.model,
            args=TrainingArguments(**{**chosen, **(arguments or {})}),
            train_dataset=features,
            data_collator=task.collate,
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


def _trainer_class(task: Task, teacher: nn.Module | None) -> Any:
    """A Trainer whose loss is the task's, or with a teacher the distillation loss."""
    from transformers import Trainer  # optional, as in `fine_tune`

    if teacher is not None:
        teacher.eval()
    own_loss = task.loss if task.has_own_loss else None

    class TaskTrainer(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            if teacher is not None:
                loss, output = distillation_loss(model, teacher, inputs, task.divergence, own_loss)
                return (loss, output) if return_outputs else loss
            if own_loss is not None:
                return (own_loss(model, inputs), None) if return_outputs else own_loss(model, inputs)
            return super().compute_loss(
                model, called_with(model, inputs), *args, return_outputs=return_outputs, **kwargs
            )

    return TaskTrainer


def _forget_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None
