"""Run as `python -m tests.faults.blocked MODEL`: commands in forked children, each with some packages hidden.

Reads a JSON list of [packages, arguments] from standard input; prints a list of [exit code, output].
"""

import json
import sys

from tests.faults.forks import result


class Without:
    """A finder of modules that does not find some packages."""

    def __init__(self, finder, packages):
        self.finder = finder
        self.packages = packages

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.packages:
            return None
        return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)


def run(packages, arguments):
    from transformers.utils import import_utils

    from secateur.cli import main

    hidden = {*packages, "secateur"} if {"torch", "transformers"} & {*packages} else {*packages}
    for name in list(sys.modules):
        if name.partition(".")[0] in hidden:
            del sys.modules[name]
    for value in vars(import_utils).values():  # it remembers what it has found
        if hasattr(value, "cache_clear"):
            value.cache_clear()
    sys.meta_path[:] = [Without(finder, packages) for finder in sys.meta_path if hasattr(finder, "find_spec")]
    main(arguments)


def load_what_all_need(model):
    """Import here what takes long, and what no command lacks."""
    import torch

    import secateur.jobs.prune_model  # noqa: F401
    from secateur.torch.open import load_model

    torch.set_num_threads(1)
    load_model(model)


if __name__ == "__main__":
    load_what_all_need(sys.argv[1])
    found = [result(lambda case=case: run(*case)) for case in json.load(sys.stdin)]
    print(json.dumps([[done.code, done.text] for done in found]))
