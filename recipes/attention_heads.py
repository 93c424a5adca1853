"""Train, score every head by sum_ij |A_ij V_j|, remove the lower half of the heads of each layer, fine-tune, save."""

from pathlib import Path

from common import arguments, prepared, report, trainer

import secateur

args = arguments(__doc__)
dense, data = prepared(args)

host = secateur.open(dense)
plan = secateur.prune(host, secateur.criteria.attention_mass, secateur.Unit("head"), budget=0.5, data=data.calibration)
secateur.verify(host, plan, data.test)  # zeroed heads and removed heads give the same outputs
host.resize(plan)
before = report("heads removed", host, data)

trainer(host.model, data).train()
after = report("fine-tuned", host, data)

host.save(Path(args.output), plan, tokenizer=data.task.processor, overwrite=True)
report("reloaded", secateur.open(args.output), data, expect=after)
