"""Tasks: what a model is for, one a file: how rows become batches, the loss, the metrics, how an answer reads.

task = secateur.tasks.find(model, processor)
batches = task.batches(secateur.tasks.read_table("reviews.csv"))
print(task.evaluate(model, batches).values)
"""

from secateur.data.read import read_table
from secateur.metrics.evaluation import Evaluation, compare
from secateur.tasks.base.batches import Batches
from secateur.tasks.base.evaluate import Reference
from secateur.tasks.base.task import Examples, Options, Task
from secateur.tasks.find import find, named
from secateur.tasks.given import given

__all__ = [
    "Batches",
    "Evaluation",
    "Examples",
    "Options",
    "Reference",
    "Task",
    "compare",
    "find",
    "given",
    "named",
    "read_table",
]
