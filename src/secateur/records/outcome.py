"""The record of a pruning job, for every framework: from its outcome, the dense model's layout and the plan."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from secateur.layout import Layout
from secateur.metrics.outcome import Outcome
from secateur.plan import Plan
from secateur.records.model import matrices_of, sizes_of, units_of
from secateur.records.quality import in_words, quality_of, stages_of
from secateur.schemas.record import Asked, Provenance, Record
from secateur.token_schedule import TokenSchedule


def record_of(
    outcome: Outcome,
    layout: Layout,
    plan: Plan,
    *,
    model_type: str | None = None,
    bytes: int | None = None,
    dense_bytes: int | None = None,
    provenance: Provenance | None = None,
) -> Record:
    """The record of an outcome.

    layout, plan: of the dense model, and what it lost. bytes, dense_bytes: of the weight files.
    """
    last = outcome.shortened or outcome.tuned or outcome.pruned
    sizes = sizes_of(layout, plan, bytes=bytes, dense_bytes=dense_bytes)
    share = sizes.parameters / sizes.dense_parameters if sizes.dense_parameters else 1.0
    return Record(
        title=outcome.name,
        task=outcome.dense.task,
        model_type=model_type,
        reading=f"{share:.1%} of the parameters; {in_words(outcome.drop)}",
        asked=[*asked_of(outcome.provenance, layout, plan), *asked_of_tokens(outcome.schedule)],
        quality=quality_of(outcome.drop, last),
        stages=stages_of(
            [
                ("dense", outcome.dense),
                ("pruned", outcome.pruned),
                ("fine-tuned", outcome.tuned),
                ("fewer tokens", outcome.shortened),
            ]
        ),
        sizes=sizes,
        units=units_of(layout, plan),
        matrices=matrices_of(layout, plan),
        notes=[note for note in (outcome.drop.reading, outcome.inexact) if note],
        provenance=provenance,
    )


def asked_of(provenance: Mapping[str, Any], layout: Layout, plan: Plan) -> list[Asked]:
    """What each step of a plan was told to remove, and what share is gone in all. provenance: of the plan."""
    steps: Sequence[Mapping[str, Any]] = provenance.get("steps", [provenance])
    share = removed_share(layout, plan)
    what = "weights are zero" if plan.masks else "units are gone"
    return [
        Asked(
            what=f"{step.get('pattern')} by {step.get('criterion')}",
            asked=_budget_in_words(step["budget"]) or str(step.get("pattern")),
            reached=f"{share:.1%} of the {what}",
        )
        for step in steps
        if "budget" in step
    ]


def asked_of_tokens(schedule: TokenSchedule | None) -> list[Asked]:
    """The schedule of tokens that a model runs with; nothing without one."""
    if schedule is None:
        return []
    return [Asked(what="tokens", asked=str(schedule), reached=f"{schedule.work():.1%} in a block on average")]


def removed_share(layout: Layout, plan: Plan) -> float:
    """The share of the ranked weights (for masks) or units (for axes) that a plan removes; 0 for an empty plan."""
    if plan.masks:
        return sum(int(m.size - m.sum()) for m in plan.masks.values()) / sum(m.size for m in plan.masks.values())
    total = sum(layout.sizes[name] for name in plan.keep)
    return 1 - sum(len(units) for units in plan.keep.values()) / total if total else 0.0


def _budget_in_words(budget: str | None) -> str:
    """`uniform: sparsity 0.5` for `Uniform(sparsity=0.5)`; empty without a budget."""
    parts = re.fullmatch(r"(\w+)\((.*)\)", budget or "")
    return f"{parts[1].lower()}: {parts[2].replace('=', ' ')}" if parts else budget or ""
