"""Fine-tuning with transformers' Trainer and held zeros, the same way for dense and pruned models."""

import logging
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.errors import DataError, TrainingDivergedError
from secateur.plan import Plan
from secateur.tasks.base.evaluate import Track
from secateur.tasks.base.task import Examples, Task
from secateur.torch.base.batches import LABELS
from secateur.torch.base.batches import arguments as called_with
from secateur.torch.host import TorchHost
from secateur.torch.train.callback import Bar, Hold, Holding
from secateur.torch.train.distil_loss import distillation_loss
from secateur.torch.train.order import Order
from secateur.training import checkpoints, ranks

logger = logging.getLogger(__name__)


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
    with_labels: bool = True,
    callbacks: Sequence[Any] = (),
    progress: Track | bool = True,
    arguments: Mapping[str, Any] | None = None,
) -> float:
    """Train `host.model` in place on encoded rows; returns the last mean loss.

    Rows without labels need a teacher.

    plan: zeros to hold during training, in addition to those of `host.plan`.
    teacher: the dense model to learn from, in addition to labels where there are any (see
        `secateur.torch.train.distil_loss`).
    with_labels: whether labels count beside the teacher.
    arguments: more fields of transformers' TrainingArguments, which win over what is chosen here. With `output_dir`
        and `save_strategy` the same call goes on from the last checkpoint of an interrupted one.
    callbacks: more callbacks for the Trainer.
    progress: what shows the steps, or whether a bar of tqdm does.

    AdamW, linear decay, 6% warm-up, gradient norm 1. Under `torchrun` every process calls this, `batch_size` is that of
    each, and all end with the same weights.

    Raises:
        DataError: when `epochs` or the learning rate is no positive number, transformers refuses `arguments`, or the
            checkpoints in `output_dir` are of another training.
        TrainingDivergedError: a DataError, when the loss or a weight is NaN or infinite.
    """
    # Optional: the Trainer imports packages of the extra `train` (accelerate, datasets).
    from transformers import PrinterCallback, ProgressCallback

    for value, option in ((epochs, "epochs"), (learning_rate, "the learning rate")):
        if not 0 < value < float("inf"):
            raise DataError(f"{option} must be a positive number, not {value}")
    features = list(examples.features)
    if teacher is None and set(LABELS).isdisjoint(features[0]):
        raise DataError("training needs labels; name their column, or learn from the dense model alone with --distil")
    hold = Hold(host, plan or Plan()) if plan is not None or host.plan is not None else None
    with tempfile.TemporaryDirectory() as scratch:
        chosen: dict[str, Any] = {
            "output_dir": scratch,
            "num_train_epochs": epochs,
            "learning_rate": learning_rate,
            "per_device_train_batch_size": batch_size,
            "weight_decay": weight_decay,
            "train_sampling_strategy": "group_by_length" if "input_ids" in features[0] else "random",
            "seed": seed,
        }
        settings = training_arguments(len(features), {**chosen, **(arguments or {})})
        start = None
        if not {"output_dir", "resume_from_checkpoint"}.isdisjoint(arguments or {}):
            kept = {k: v for k, v in {**chosen, **(arguments or {})}.items() if not _is_of_files(k)}
            samples = [repr(feature)[:1000] for feature in (features[0], features[-1])]
            facts = (
                sorted(kept.items(), key=str),
                len(features),
                samples,
                (teacher is not None, with_labels),
                len(callbacks),
            )
            start = _start(host, settings, {} if plan is None else plan.masks, facts)
        trainer = _made(
            _trainer_class(task, teacher, with_labels=with_labels),
            model=host.model,
            args=settings,
            train_dataset=features,
            data_collator=task.collate,
            callbacks=[*callbacks, *([hold] if hold is not None else [])],
        )
        for printing in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(printing)
        bar = Bar(None if progress is True else progress) if progress else None
        if bar is not None:
            trainer.add_callback(bar)
        try:
            loss = trainer.train(resume_from_checkpoint=start).training_loss
        finally:
            for callback in (hold, bar, *callbacks):
                if isinstance(callback, Bar | Holding):
                    callback.close()
            trainer.accelerator.unwrap_model(host.model, keep_fp32_wrapper=False)  # mixed precision ends here
            _forget_gradients(host.model)
    if not math.isfinite(loss) or not all(bool(p.isfinite().all()) for p in host.model.parameters()):
        raise TrainingDivergedError(
            f"training diverged (mean loss {loss}); lower the learning rate ({settings.learning_rate}) or check the "
            "labels"
        )
    host.model.eval()
    return loss


def training_arguments(rows: int, given: Mapping[str, Any]) -> Any:
    """transformers' TrainingArguments for so many rows: the fields that are given, and the rest as it is good here.

    Unless the number of steps is given, it follows from the epochs, rounded.

    Raises DataError for a value that transformers refuses.
    """
    from transformers import TrainingArguments  # optional: it needs a package of the extra `train` (accelerate)

    chosen: dict[str, Any] = {
        "optim": "adamw_torch_fused",
        "logging_nan_inf_filter": False,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "remove_unused_columns": False,
        "use_cpu": not torch.accelerator.is_available(),  # else accelerate sees no other process
        "ddp_timeout": int(ranks.PATIENCE.total_seconds()),
    }
    if not given.get("report_to"):
        chosen["logging_strategy"] = "no"
    if given.get("save_strategy") is None and "save_steps" not in given:
        chosen["save_strategy"] = "no"
    settings = _made(TrainingArguments, **{**chosen, **given})
    if "max_steps" not in given:
        together = settings.train_batch_size * settings.gradient_accumulation_steps * settings.world_size
        settings.max_steps = max(1, round(settings.num_train_epochs * -(-rows // together)))
    if "warmup_steps" not in given:
        settings.warmup_steps = max(1, round(0.06 * settings.max_steps))
    return settings


def _is_of_files(field: str) -> bool:
    """Whether a training argument says where results go, so that the training is the same without it."""
    return field.startswith(("output_dir", "resume", "save_", "logging_", "report_to", "run_name"))


def _start(host: TorchHost, settings: Any, masks: Mapping[str, Any], facts: Any) -> str | None:
    """The checkpoint at which every process begins, or None; see `secateur.training.checkpoints`."""
    if settings.save_strategy == "no" and not settings.resume_from_checkpoint:
        return None
    found = None
    if ranks.is_first():
        identity = checkpoints.identity_of(host.model, masks, facts)
        found = checkpoints.to_resume(Path(settings.output_dir), identity, settings.resume_from_checkpoint)
        if found is not None:
            logger.warning("training goes on from %s", found)
    found = ranks.shared(found)
    return None if found is None else str(found)


def _made(cls: Any, **options: Any) -> Any:
    """An object of transformers; DataError with its sentence where it refuses an option or lacks what one needs."""
    try:
        return cls(**options)
    except (ValueError, TypeError) as error:
        raise DataError(f"transformers refuses these training arguments: {error}") from error
    except RuntimeError as error:
        if "installed" not in str(error):
            raise
        raise DataError(f"these training arguments need a package that is missing: {error}") from error


def _trainer_class(task: Task, teacher: nn.Module | None, *, with_labels: bool) -> Any:
    """A Trainer whose loss is the task's, or with a teacher the distillation loss."""
    from transformers import Trainer  # optional, as in `fine_tune`

    if teacher is not None:
        teacher.eval()
    own_loss = task.loss if task.has_own_loss else None

    class TaskTrainer(Trainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            # Else the Trainer takes each loss for a share of the whole step's tokens and never divides it, by neither
            # accumulation steps nor processes. Most losses are plain means, so their gradients would be too large.
            self.model_accepts_loss_kwargs = False

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            strategy, rows = self.args.train_sampling_strategy, self.train_dataset
            if strategy not in ("group_by_length", "random"):
                return super()._get_train_sampler(train_dataset)
            a = self.args
            together = a.train_batch_size * a.gradient_accumulation_steps * a.world_size
            lengths = [task.length(row) for row in rows] if strategy == "group_by_length" else None
            return Order(len(rows), a.data_seed if a.data_seed is not None else a.seed, lengths, together)

        def compute_loss(self, model: Any, inputs: Any, *args: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            if teacher is not None:
                loss, output = distillation_loss(
                    model, teacher, inputs, task.divergence, own_loss, with_labels=with_labels
                )
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
