"""Train, set every weight with |w| <= tau to zero, fine-tune in a plain PyTorch loop with the zeros held, save."""

from pathlib import Path

import torch
from common import arguments, prepared, report

import secateur

args = arguments(__doc__)
dense, data = prepared(args)  # a trained classifier, and batches

host = secateur.open(dense)
tau = 0.04
plan = secateur.prune(host, secateur.criteria.magnitude, secateur.Element(), secateur.Threshold(tau))
host.apply(plan)
before = report("pruned", host, data)

optimizer = torch.optim.AdamW(host.model.parameters(), lr=1e-4, weight_decay=0.01)
with host.hold(plan):  # zeros stay zero, whatever the optimizer does
    host.model.train()
    for batch in data.training_batches():
        host.model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
after = report("fine-tuned", host, data)

for name, mask in plan.masks.items():
    if host.read(name)[~torch.from_numpy(mask)].any():
        raise SystemExit(f"a removed weight of {name} is not zero")
host.save(Path(args.output), plan, tokenizer=data.task.processor, overwrite=True)
report("reloaded", secateur.open(args.output), data, expect=after)
