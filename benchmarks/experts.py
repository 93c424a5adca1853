"""What it costs a mixture of experts to lose half of its experts, by criterion: a tiny Mixtral on a toy language.

    python benchmarks/experts.py [--seeds 0 1 2] [--steps 600] [--write]

The language has eight dialects. A text starts with the name of its dialect; then each word has one successor in each
dialect, which follows it nine times of ten, and any word follows otherwise. A Mixtral of two layers with eight experts
is trained on it for a minute or less. Then half of the experts of each layer go, with no training after it. Calibration
texts are of all dialects, or of two, as when a general mixture is to serve one use; test texts are others of the same
dialects. Random experts are the mean of ten draws.
"""

import argparse
import datetime
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import transformers
from setting import setting

import secateur
from secateur import criteria
from secateur.host import Host
from secateur.plan import Plan

WORDS, DIALECTS, LENGTH, FAITHFUL = 48, 8, 32, 0.9
EXPERTS = 8
DRAWS = 10
USES = {"all dialects": tuple(range(DIALECTS)), "two dialects": (0, 1)}


CRITERIA: dict[str, Callable] = {
    "routed_saliency": criteria.routed_saliency,
    "routing_frequency": criteria.routing_frequency,
    "routed_mass": criteria.routed_mass,
    "magnitude": criteria.magnitude,
}


def texts(count: int, dialects: tuple[int, ...], rng: np.random.Generator) -> torch.Tensor:
    """Token ids (count, LENGTH): the name of a dialect, then words."""
    successors = np.stack([np.random.default_rng(d).permutation(WORDS) for d in range(DIALECTS)])
    dialect = rng.choice(dialects, count)
    ids = np.empty((count, LENGTH), np.int64)
    ids[:, 0] = WORDS + dialect
    ids[:, 1] = rng.integers(WORDS, size=count)
    for i in range(2, LENGTH):
        follows = rng.random(count) < FAITHFUL
        ids[:, i] = np.where(follows, successors[dialect, ids[:, i - 1]], rng.integers(WORDS, size=count))
    return torch.from_numpy(ids)


def least_loss() -> float:
    """The loss of the language itself, nats a token: no model can predict better."""
    likely = FAITHFUL + (1 - FAITHFUL) / WORDS
    other = (1 - FAITHFUL) / WORDS
    of_words = -likely * math.log(likely) - (WORDS - 1) * other * math.log(other)
    return (math.log(WORDS) + (LENGTH - 2) * of_words) / (LENGTH - 1)


def trained(seed: int, steps: int) -> transformers.MixtralForCausalLM:
    """A Mixtral that has learned the language. Its loss has a term that spreads tokens over experts."""
    torch.manual_seed(seed)
    config = transformers.MixtralConfig(
        vocab_size=WORDS + DIALECTS, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=EXPERTS, num_experts_per_tok=2, max_position_embeddings=LENGTH,
        output_router_logits=True, router_aux_loss_coef=0.01, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).train()
    rng = np.random.default_rng(100 + seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for step in range(steps):
        ids = texts(32, USES["all dialects"], rng)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"seed {seed}, step {step}: loss {float(loss.detach()):.3f}", flush=True)
    model.config.output_router_logits = False
    return model.eval()


@torch.no_grad()
def loss_of(host: Host, plan: Plan, ids: torch.Tensor) -> float:
    """Nats a token on test texts, with the experts that a plan removes never chosen."""
    with host.masked(plan):
        return float(host.model(input_ids=ids, labels=ids).loss)


def drawn(host: Host, seed: int) -> Plan:
    """Half of the experts of each layer, by chance."""
    rng = np.random.default_rng(seed)
    axes = host.layout.of_kind("expert")
    return Plan({a.name: np.sort(rng.choice(a.size, a.size // 2, replace=False)) for a in axes})


def measured(seed: int, steps: int) -> Iterator[tuple[str, str, float]]:
    """(use, what goes, nats a token) of one trained model."""
    host = secateur.open(trained(seed, steps))
    for use, dialects in USES.items():
        calibration = [{"input_ids": texts(64, dialects, np.random.default_rng(1000 + seed))}]
        test = texts(256, dialects, np.random.default_rng(2000 + seed))
        yield use, "nothing", loss_of(host, Plan(), test)
        for name, criterion in CRITERIA.items():
            plan = secateur.prune(host, criterion, secateur.Unit("expert"), 0.5, data=calibration)
            secateur.verify(host, plan, calibration)
            yield use, name, loss_of(host, plan, test)
        yield use, "by chance", float(np.mean([loss_of(host, drawn(host, draw), test) for draw in range(DRAWS)]))


def page(rows: list[tuple[int, str, str, float]], steps: int) -> str:
    """The result page in Markdown."""
    seeds = sorted({seed for seed, *_ in rows})
    command = f"`python benchmarks/experts.py --seeds {' '.join(map(str, seeds))} --steps {steps} --write`"
    lines = [
        "# Half of the experts of a small mixture",
        "",
        setting(command, ("torch", "transformers"), f"{torch.get_num_threads()} thread"),
        "",
        f"A Mixtral of two layers with {EXPERTS} experts, two a token, trained from scratch on a toy language of "
        f"{DIALECTS} dialects; half of the experts of each layer go, and nothing is trained after it. Loss on test "
        f"texts, nats a token; the language itself has {least_loss():.3f}. By chance: the mean of {DRAWS} draws. One "
        "column a seed, of training and of texts. A toy says which order the criteria have here, not what a large "
        "mixture loses.",
        "",
        "| calibration and test | what goes | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean |",
        "|---|---|" + "---|" * (len(seeds) + 1),
    ]
    for use, what in dict.fromkeys((use, what) for _, use, what, _ in rows):
        found = [value for _, u, w, value in rows if (u, w) == (use, what)]
        values = " | ".join(f"{value:.3f}" for value in (*found, float(np.mean(found))))
        lines.append(f"| {use} | {what if ' ' in what or what == 'nothing' else f'`{what}`'} | {values} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train, prune, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, text = [], ""
    for seed in options.seeds:
        for row in measured(seed, options.steps):
            rows.append((seed, *row))
            print(*rows[-1], flush=True)
        text = page(rows, options.steps)
        if options.write:
            path = Path(__file__).parent / "results" / f"{datetime.date.today()}-experts.md"
            path.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
