"""Models with units removed, for tests of files, and JSON files that are changed."""

import json

from secateur.torch.shrink.resize import resize
from tests import zoo
from tests.torch.layouts import UNEVEN, layout_of


def shrunk(family, keep=None, **options):
    model = zoo.build(family, **options)
    resize(model, layout_of(model), UNEVEN[family] if keep is None else keep)
    return model


def edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
