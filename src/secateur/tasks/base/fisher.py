"""Scores whose squares are the curvature of a divergence: what a backward pass needs to see the Fisher information.

A random number whose gradient s has E[s s^T] = H, where H is the Hessian of the divergence at the dense model. For KL
between classes that is log p of a label drawn from the model itself (Martens, 2020), and for two classes, without a
draw, sqrt(p0 p1) (z1 - z0). Each score has mean zero, so that those of several positions can be added before they are
squared: the cross terms vanish in expectation.
"""

import torch


def signs(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """+1 or -1 with even chances, in the shape of `values`."""
    drawn = torch.randint(0, 2, tuple(values.shape), generator=generator)
    return (2 * drawn - 1).to(values)


def noise(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Standard normal numbers in the shape of `values`."""
    return torch.randn(tuple(values.shape), generator=generator).to(values)


def class_scores(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The score of each position (n,), from its logits (n, classes). generator: on the CPU."""
    logits = logits.float()
    shares = logits.detach().softmax(-1)
    if logits.shape[-1] == 2:
        score = shares.prod(-1).sqrt() * (logits[:, 1] - logits[:, 0])
        return score * signs(score, generator)
    ends = shares.cumsum(-1)
    drawn = torch.rand(len(ends), 1, generator=generator).to(ends) * ends[:, -1:]
    labels = torch.searchsorted(ends, drawn).clamp_max(logits.shape[-1] - 1)
    return logits.log_softmax(-1).gather(-1, labels)[:, 0]


def binary_scores(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The score of each label that is there or not, in the shape of the logits."""
    logits = logits.float()
    share = logits.detach().sigmoid()
    return (share * (1 - share)).sqrt() * logits * signs(logits, generator)
