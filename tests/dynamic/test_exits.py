"""One early exit: the closed form of its head, the block that is chosen, and runs that stop."""

import threading

import numpy as np
import pytest
import torch

from secateur.dynamic import fit_exit, prune_tokens
from secateur.dynamic.exits import EarlyExit, _cross_validated, _ridge
from secateur.errors import DataError, ModelError


@pytest.fixture(scope="module")
def early(trained, batches):
    return fit_exit(trained[0], batches(400), 0.93)


def blocks_run(model, run):
    """How often each block ran during a call."""
    counts = [0] * 4
    handles = [
        block.register_forward_pre_hook(lambda m, a, i=i: counts.__setitem__(i, counts[i] + 1))
        for i, block in enumerate(model.bert.encoder.layer)
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return counts


def test_a_ridge_head_is_the_normal_equations():
    rng = np.random.default_rng(0)
    features = rng.normal(3, [0.1, 5.0, 1.0], (50, 3))
    logits = rng.normal(size=(50, 2))
    ((weight, bias),) = _ridge(features, logits, [0.5])
    spread = features.std(0)
    inputs = (features - features.mean(0)) / spread
    targets = logits - logits.mean(1, keepdims=True)
    solved = np.linalg.solve(inputs.T @ inputs + 25 * np.eye(3), inputs.T @ (targets - targets.mean(0)))
    expected = inputs @ solved + targets.mean(0)
    assert np.allclose(features @ weight.T + bias, expected)


def test_a_feature_that_never_varies_is_no_matter():
    features = np.concatenate([np.random.default_rng(0).normal(size=(50, 2)), np.full((50, 1), 7.0)], 1)
    ((weight, bias),) = _ridge(features, features[:, :2] @ np.array([[1.0, -1.0], [2.0, 0.0]]), [1e-9])
    assert np.isfinite(weight).all()
    predicted = features @ weight.T + bias
    assert np.allclose(predicted[:, 0] - predicted[:, 1], features[:, :2] @ [2, 2], atol=1e-6)


def test_rows_left_out_choose_the_penalty():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(200, 30))
    signal = features @ rng.normal(size=30)
    clean, _ = _cross_validated(features, np.stack([signal, -signal], 1))
    noise = rng.normal(size=200) * 50
    noisy, _ = _cross_validated(features, np.stack([signal + noise, -signal - noise], 1))
    assert clean < noisy


def test_an_exit_saves_blocks_and_agrees_on_fresh_rows(trained, batches, early):
    assert early.blocks == 4
    assert 1 <= early.block < 4
    assert early.rows == 200
    assert early.work < 0.9
    agreed = escalated = 0
    fresh = batches(300, seed=9, size=1)
    for batch in fresh:
        found = early.run(trained[0].model, batch)
        with torch.no_grad():
            full = trained[0].model(**batch).logits
        agreed += int(found.logits.argmax() == full.argmax())
        escalated += int(found.escalated)
        assert not found.escalated or torch.equal(found.logits, full)
    assert agreed / 300 >= 0.93
    assert escalated / 300 == pytest.approx(early.escalated, abs=0.1)


def with_threshold(early, threshold):
    return EarlyExit(**{**vars(early), "threshold": threshold})


def test_a_sure_row_stops_the_model_after_the_block(trained, batches, early):
    (batch,) = batches(1)
    model, seen = trained[0].model, []
    last = model.bert.encoder.layer[early.block - 1]
    hooks = len(last._forward_hooks)
    sure, unsure = with_threshold(early, 0.0), with_threshold(early, 2.0)
    counts = blocks_run(model, lambda: seen.append(sure.run(model, batch)))
    assert counts == [1] * early.block + [0] * (4 - early.block)
    assert blocks_run(model, lambda: seen.append(unsure.run(model, batch))) == [1] * 4
    assert len(last._forward_hooks) == hooks
    assert [found.escalated.tolist() for found in seen] == [[False], [True]]
    with torch.no_grad():
        states = model(**batch, output_hidden_states=True).hidden_states[early.block]
    head = states[:, 0] @ torch.from_numpy(early.weight).T + torch.from_numpy(early.bias)
    assert torch.allclose(seen[0].logits, head, atol=1e-6)


def test_a_batch_goes_on_for_its_unsure_rows(trained, batches, early):
    (batch,) = batches(8)
    single = [
        with_threshold(early, 0.0).run(trained[0].model, {k: v[i : i + 1] for k, v in batch.items()}).logits
        for i in range(8)
    ]
    confidence = torch.cat(single).softmax(1).amax(1)
    found = with_threshold(early, float(confidence.median()) + 1e-6).run(trained[0].model, batch)
    assert 0 < found.escalated.sum() < 8
    with torch.no_grad():
        full = trained[0].model(**batch).logits
    assert torch.allclose(found.logits, torch.where(found.escalated[:, None], full, torch.cat(single)), atol=1e-5)


def test_threads_share_a_model(trained, batches, early):
    given = batches(30, size=1)
    expected = [early.run(trained[0].model, batch) for batch in given]
    found, whole = [None] * 30, []

    def work(start):
        for i in range(start, 30, 2):
            found[i] = early.run(trained[0].model, given[i])

    def plain():
        with torch.no_grad():
            whole.extend(trained[0].model(**batch).logits for batch in given)

    threads = [threading.Thread(target=work, args=(0,)), threading.Thread(target=work, args=(1,))]
    threads.append(threading.Thread(target=plain))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(whole) == 30  # runs of other threads never stop at the exit
    assert 0 < sum(bool(a.escalated) for a in expected) < 30
    assert all(torch.allclose(a.logits, b.logits, atol=1e-6) for a, b in zip(expected, found, strict=True))


def test_what_cannot_have_an_exit_is_refused(trained, batches, early):
    with pytest.raises(DataError, match="50 rows cannot certify an exit at 99% agreement .* it takes 598 rows"):
        fit_exit(trained[0], batches(50))
    with pytest.raises(DataError, match="it takes 40 rows"):
        fit_exit(trained[0], batches(30), 0.5, 0.5)
    with pytest.raises(ModelError, match="has a schedule of tokens"):
        fit_exit(prune_tokens(trained[0], "mid"), batches(50))
    trained[0].model.train()
    try:
        with pytest.raises(ModelError, match="training mode"):
            early.run(trained[0].model, batches(1)[0])
    finally:
        trained[0].model.eval()
