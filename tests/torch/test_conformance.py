"""The torch host passes the suite of every host, on Hugging Face models and on a module of one's own."""

import numpy as np
import torch
from torch import nn

import secateur
from secateur.torch.files import saving
from secateur.torch.host import TorchHost
from tests import zoo
from tests.conformance import Conformance

HOSTS: dict[type, TorchHost] = {}


class TorchConformance(Conformance):
    needs = (*Conformance.needs, "gram")
    sizes = (4, 3)
    length = 7
    pad_side = "right"

    def make(self):
        """A host of its own for each test; the model is traced once."""
        if type(self) not in HOSTS:
            HOSTS[type(self)] = secateur.open(self.model(), self.example(), **self.options())
        return HOSTS[type(self)].copy()

    def example(self):
        return None

    def options(self):
        return {}

    def labels(self, generator, size):
        return torch.randint(0, 2, (size,), generator=generator)

    def batches(self):
        generator = torch.Generator().manual_seed(0)
        found = []
        for size in self.sizes:
            ids = torch.randint(3, zoo.VOCAB, (size, self.length), generator=generator)
            mask = torch.ones_like(ids)
            mask[0, slice(0, 2) if self.pad_side == "left" else slice(5, None)] = 0
            found.append({"input_ids": ids, "attention_mask": mask, "labels": self.labels(generator, size)})
        return found

    def padded(self, batch):
        pads = (3, 0) if self.pad_side == "left" else (0, 3)
        longer = {key: nn.functional.pad(batch[key], pads) for key in ("input_ids", "attention_mask")}
        return {**longer, "labels": batch["labels"]}

    def loss(self, host, batch):
        return host.model(**batch).loss

    def items(self, batch):
        """How many items the loss is the mean over."""
        return len(next(iter(batch.values())) if isinstance(batch, dict) else batch[0])

    def train(self, host, batches):
        host.model.train()
        optimizer = torch.optim.AdamW(host.model.parameters(), lr=1e-2, weight_decay=0.1)
        for _ in range(3):
            for batch in batches:
                self.loss(host, batch).backward()
                optimizer.step()
                optimizer.zero_grad()
        host.model.eval()

    def load(self, folder, host):
        return TorchHost.untraced(saving.load(folder))

    def shapes(self, host):
        return {name: tuple(p.shape) for name, p in host.model.named_parameters(remove_duplicate=False)}

    def mask(self, batch):
        return batch["attention_mask"].bool()

    def slow(self, host, batches):
        """Input squares by hooks on one FFN, one row after another; gradients by autograd of the weighted loss."""
        down = next(n for n in host.layout.linears if host.layout.carries(n, "L0.ffn") and self.reads_ffn(host, n))
        squares, absolute, gram, count = 0.0, 0.0, 0.0, 0
        seen = []
        path = down.rpartition(".")[0]
        handle = host.model.get_submodule(path).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        total = everything = 0.0
        for batch in batches:
            seen.clear()
            loss = self.loss(host, batch)
            items = self.items(batch)
            total, everything = total + loss * items, everything + items
            x, mask = seen[0].detach(), self.mask(batch)
            for i in range(x.shape[0]):
                for j in range(x.shape[1]):
                    if mask is None or mask[i, j]:
                        squares, absolute, count = squares + x[i, j] ** 2, absolute + x[i, j].abs(), count + 1
                        gram = gram + torch.outer(x[i, j], x[i, j])
        handle.remove()
        grad = torch.autograd.grad(total / everything, host.parameters()[down])[0]
        return {
            "act_sq": {down: (squares / count).numpy()},
            "gram": {down: (gram / count).numpy()},
            "unit_act": {"L0.ffn": (absolute / count).numpy()},
            "grad": {down: grad.numpy()},
        }

    def reads_ffn(self, host, name):
        return host.layout.owners(name, "L0.ffn")[host.layout.linears[name].in_dim] is not None

    def test_the_training_flag_comes_back(self, host):
        host.model.train()
        host.outputs(self.batches()[0])
        host.collect(["act_sq"], self.batches())
        assert all(module.training for module in host.model.modules())


class TestBert(TorchConformance):
    def model(self):
        return zoo.bert(num_hidden_layers=2)


class TestLlama(TorchConformance):
    pad_side = "left"

    def model(self):
        return zoo.llama(num_hidden_layers=2)

    def labels(self, generator, size):
        labels = torch.randint(3, zoo.VOCAB, (size, self.length), generator=generator)
        labels[:, 0] = labels[0, :3] = -100  # what a padding position would predict
        return labels

    def items(self, batch):
        return int((batch["labels"] != -100).sum())

    def padded(self, batch):
        return {**super().padded(batch), "labels": nn.functional.pad(batch["labels"], (3, 0), value=-100)}


class TestViT(TorchConformance):
    def model(self):
        return zoo.vit(num_hidden_layers=2)

    def batches(self):
        generator = torch.Generator().manual_seed(0)
        return [
            {
                "pixel_values": torch.randn(size, 3, 16, 16, generator=generator),
                "labels": torch.randint(0, 3, (size,), generator=generator),
            }
            for size in self.sizes
        ]

    def padded(self, batch):
        return None

    def mask(self, batch):
        return None


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x):
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(batch, length, 3, -1, 4).permute(2, 0, 3, 1, 4)
        attention = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(attention.transpose(1, 2).reshape(batch, length, -1))
        return x + self.down(nn.functional.gelu(self.up(x)))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


class TestModule(TorchConformance):
    needs = ("grad", "grad_sq", "act_sq", "gram", "unit_act", "unit_grad_sq")

    def model(self):
        torch.manual_seed(0)
        return Encoder().eval()

    def example(self):
        return (torch.randn(2, 5, 16),)

    def options(self):
        return {"loss": lambda model, batch: model(batch[0]).square().mean()}

    def batches(self):
        generator = torch.Generator().manual_seed(0)
        return [(torch.randn(size, 5, 16, generator=generator),) for size in self.sizes]

    def padded(self, batch):
        return None

    def mask(self, batch):
        return None

    def loss(self, host, batch):
        return host.loss(host.model, batch)

    def load(self, folder, host):
        return secateur.torch.host.TorchHost.untraced(saving.load(folder, self.model()))


def test_numbers_of_the_suite_are_not_trivial():
    """The statistics that the suite compares differ from unit to unit."""
    suite = TestBert()
    host = suite.make()
    stats = host.collect(["attn_mass", "unit_act"], suite.batches())
    assert np.ptp(stats.mean("attn_mass", "L0.head")) > 1e-3
    assert np.ptp(stats.mean("unit_act", "L0.ffn")) > 1e-3
