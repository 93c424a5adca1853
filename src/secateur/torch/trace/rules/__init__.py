"""One small function for each ATen operation; an operation that is not in this table freezes what touches it."""

from secateur.torch.trace.rules import elementwise, lookup, product, reduce, shape
from secateur.torch.trace.values import Rule

RULES: dict[str, Rule] = {
    **elementwise.RULES,
    **shape.RULES,
    **product.RULES,
    **reduce.RULES,
    **lookup.RULES,
}
