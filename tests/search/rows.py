"""Tiny hosts of tasks with the rows of a search."""

from secateur.jobs.open_task import look, open_host
from secateur.search.rows import Rows
from secateur.tasks import Batches, Options, read_table
from tests.tasks import language
from tests.text_models import sentences, write_classifier, write_csv, write_texts


def classifier(folder, count=96, **options):
    """Host, task and rows of a BERT of two layers."""
    return of_folder(write_classifier(folder / "model", **options), write_texts(folder / "a.csv", count), count)


def texts_alone(folder, count=96):
    """As `classifier`, without labels."""
    rows = [(text,) for text, _ in sentences(count)]
    return of_folder(write_classifier(folder / "model"), write_csv(folder / "a.csv", rows, ("text",)), count)


def llama(folder, count=48):
    """Host, task and rows of a Llama of three layers with grouped queries."""
    texts = language.write_lines(folder / "a.txt", language.counting(count, 10))
    return of_folder(language.write(folder / "model", "llama"), texts, count)


def of_folder(folder, data, count):
    """Host, task and rows of a model folder and a file of texts."""
    host, task = open_host(look(str(folder), None), Options(max_length=16))
    table = read_table(data)
    parts = [task.encode(table.take(range(*part))) for part in ((0, count // 2), (count // 2, count))]
    train, held_out = parts
    batches = [Batches(task, part, 8) for part in (train.take(16), held_out, held_out)]
    return host, task, Rows(train, *batches, batch_size=8)
