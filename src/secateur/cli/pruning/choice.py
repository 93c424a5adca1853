"""What `secateur prune` shall prune: criterion, pattern and budget from the words of the command line."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secateur.budget import Budget
    from secateur.select import Pattern
    from secateur.torch.host import TorchHost


@dataclass(frozen=True)
class Choice:
    """What to prune.

    criterion: a function of `secateur.criteria`.
    budget: how much; None for N:M, and for a sweep.
    sweep: the budgets to try instead, or None.
    """

    criterion: Any
    pattern: "Pattern"
    budget: "Budget | None" = None
    sweep: "list[Budget] | None" = None


def make_sweep(criterion: str, pattern: str, sweep: str, sweep_by: str, budget: str) -> Choice:
    """The choice that --sweep, --sweep-by and --budget ask for."""
    from secateur.errors import PlanError

    score, shape = find(criterion, pattern)
    budgets = [make_budget(value, sweep_by, budget) for value in read_list(sweep)]
    if share_in_pattern(pattern):
        raise PlanError(f"pattern {pattern} says itself how much goes, so there is nothing to sweep; leave out --sweep")
    return Choice(score, shape, sweep=budgets)


def make_choice(criterion: str, pattern: str, sparsity: float | None, threshold: float | None, budget: str) -> Choice:
    """The choice that --sparsity, --threshold and --budget ask for."""
    from secateur.errors import PlanError

    score, shape = find(criterion, pattern)
    if sparsity is not None and threshold is not None:
        raise PlanError("--sparsity and --threshold exclude each other; pass one")
    if share_in_pattern(pattern):
        if sparsity is not None or threshold is not None:
            raise PlanError(f"pattern {pattern} says itself how much goes; leave out --sparsity and --threshold")
        return Choice(score, shape)
    if sparsity is not None:
        return Choice(score, shape, make_budget(sparsity, "sparsity", budget))
    if threshold is not None:
        return Choice(score, shape, make_budget(threshold, "threshold", budget))
    raise PlanError(
        "how much? pass --sparsity 0.5, --threshold 0.02, or --sweep to see what they would do; or let secateur "
        "choose: --speed-up 2 --on onnx"
    )


def needed(what: str) -> str:
    """The sentence of an error where a command line lacks something, with a whole one to begin with."""
    return (
        f"{what} is needed, as in `secateur prune ./model --data rows.csv --speed-up 2 --on onnx --output ./small`; "
        "see `secateur prune --help`"
    )


def find(criterion: str, pattern: str) -> "tuple[Any, Pattern]":
    """The criterion and the pattern of those names; PlanError for a pattern that the criterion cannot score."""
    from secateur.fit import check_pattern
    from secateur.pruning import needs_of
    from secateur.select import parse_pattern

    score, shape = find_criterion(criterion), parse_pattern(pattern)
    check_pattern(criterion, needs_of(score), shape)
    return score, shape


def check(choice: Choice, host: "TorchHost") -> None:
    """PlanError when the model has no such units, or the criterion cannot score them."""
    from secateur.fit import check_axes
    from secateur.pruning import needs_of
    from secateur.select import Unit, resolve_axes

    if isinstance(choice.pattern, Unit):
        axes = resolve_axes(host.layout, choice.pattern)
        check_axes(choice.criterion.__name__, needs_of(choice.criterion), host.layout, axes)


def find_criterion(name: str) -> Any:
    """The function of that name in `secateur.criteria`."""
    from secateur import criteria
    from secateur.errors import PlanError, meant

    known = [n for n in criteria.__all__ if n != "threshold"]
    if name not in known:
        raise PlanError(
            f"no criterion {name!r}; there is {', '.join(known)}, and for single weights of language models, with "
            f"--calibration FILE, the methods of secateur.repair{meant(name, known)}"
        )
    return getattr(criteria, name)


def make_budget(value: float, by: str, budget: str) -> "Budget":
    """A budget from a number, what it is (sparsity or threshold), and the name of --budget."""
    from secateur.budget import Global, PerKind, Threshold, Uniform, check_sparsity
    from secateur.errors import PlanError, meant

    if by == "threshold":
        if not value >= 0:
            raise PlanError(f"threshold {value} is negative, and scores are not; pass a number from 0 upwards")
        return Threshold(value)
    if by != "sparsity":
        raise PlanError(f"--sweep-by {by!r} is neither sparsity nor threshold; pass one of them")
    makers: dict[str, Callable[[float], Budget]] = {"uniform": Uniform, "global": Global, "per-kind": PerKind}
    if budget not in makers:
        raise PlanError(f"no budget {budget!r}; there is {', '.join(makers)}{meant(budget, makers)}")
    return makers[budget](check_sparsity(value))


def has_units(pattern: str) -> bool:
    """Whether a pattern names kinds of units."""
    from secateur.select import Unit, parse_pattern

    return isinstance(parse_pattern(pattern), Unit)


def share_in_pattern(pattern: str) -> bool:
    """Whether a pattern itself says how much goes."""
    from secateur.select import NM, parse_pattern

    return isinstance(parse_pattern(pattern), NM)


def read_list(text: str) -> list[float]:
    """The numbers of a --sweep list."""
    from secateur.errors import PlanError

    try:
        values = [float(word) for word in text.split(",") if word.strip()]
    except ValueError:
        raise PlanError(f"--sweep {text!r} is not a list of numbers such as 0.5,0.7,0.9") from None
    if not values:
        raise PlanError("--sweep is empty; pass numbers such as 0.5,0.7,0.9")
    return values


def kind_of(model: str, sweep: str | None, sweep_by: str, *, has_text: bool = False) -> str:
    """The kind of run, by its name in `secateur.cli.kinds`, of a model that is not pruned block by block.

    has_text: whether there is --calibration text.
    """
    from secateur.find_host import is_keras_file

    if is_keras_file(model):
        return "keras"
    if has_text:
        return "units"
    if sweep is None:
        return "classifier"
    return "thresholds" if sweep_by == "threshold" else "sweep"
