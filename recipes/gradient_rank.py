"""Train, rank weights by |dL/dw| on training data, remove the lowest 30%, fine-tune with the Trainer, save packed."""

from pathlib import Path

from common import arguments, prepared, report, trainer

import secateur

args = arguments(__doc__)
dense, data = prepared(args)

host = secateur.open(dense)
plan = secateur.prune(host, secateur.criteria.gradient, secateur.Element(), secateur.Global(0.3), data=data.calibration)
host.apply(plan)
before = report("pruned", host, data)

trainer(host.model, data, callbacks=[secateur.Hold(host, plan)]).train()
after = report("fine-tuned", host, data)

host.save(Path(args.output), plan, tokenizer=data.task.processor, overwrite=True)
report("reloaded", secateur.open(args.output), data, expect=after)
