"""The self-cascade: exact bounds by hand, thresholds by brute force, answers row by row."""

import math
import threading

import numpy as np
import pytest
import torch

from secateur.dynamic import all_tokens, answer, calibrate, prune_tokens
from secateur.dynamic.cascade import Cascade, confidence_of, quantile, rows_of
from secateur.dynamic.certificate import certified_threshold, lower_bound, most_errors, rows_needed, tail
from secateur.errors import DataError, ModelError
from tests import zoo

# -- bounds ---------------------------------------------------------------------------------------------------------


def test_299_rows_without_an_error_certify_99_percent():
    assert rows_needed(0.99, 0.95) == 299
    assert most_errors(298, 0.99, 0.95) == -1
    assert most_errors(299, 0.99, 0.95) == 0
    assert lower_bound(299, 0, 0.95) == pytest.approx(0.05 ** (1 / 299), abs=1e-12)
    assert lower_bound(298, 0, 0.95) < 0.99 < lower_bound(299, 0, 0.95)


def test_one_row_needs_no_more_than_the_shares_say():
    assert rows_needed(0.5, 0.5) == 1
    assert most_errors(1, 0.5, 0.5) == 0


@pytest.mark.parametrize(("rows", "errors", "rate"), [(10, 3, 0.2), (1, 0, 0.5), (473, 0, 0.01), (1000, 15, 0.01)])
def test_the_tail_is_the_sum_of_its_terms(rows, errors, rate):
    terms = [math.comb(rows, k) * rate**k * (1 - rate) ** (rows - k) for k in range(errors + 1)]
    assert tail(rows, errors, rate) == pytest.approx(math.fsum(terms), rel=1e-10)


def test_the_tail_ends_where_its_numbers_do():
    assert tail(5, 5, 0.3) == tail(5, 2, 0.0) == 1.0
    assert tail(5, 4, 1.0) == tail(5, -1, 0.3) == 0.0


def test_known_bounds_with_errors():
    # published one-sided 95% Clopper-Pearson bounds: of 10 rows 1 error leaves 60.6%, of 473 rows 1 leaves 99.0%
    assert lower_bound(10, 1, 0.95) == pytest.approx(0.6058, abs=1e-4)
    assert [most_errors(rows, 0.99, 0.95) for rows in (472, 473, 627, 628)] == [0, 1, 1, 2]
    assert lower_bound(4, 4, 0.95) == 0.0


def test_the_most_errors_are_those_whose_bound_is_high_enough():
    for rows in (40, 100, 250):
        most = most_errors(rows, 0.9, 0.95)
        assert lower_bound(rows, most, 0.95) >= 0.9 > lower_bound(rows, most + 1, 0.95)


# -- thresholds -----------------------------------------------------------------------------------------------------


def test_the_threshold_is_the_lowest_that_is_certified():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.5, 1, 400)
    agrees = rng.uniform(size=400) < confidence
    threshold = certified_threshold(confidence, agrees, 0.9, 0.95)

    def certified(bar):
        return lower_bound(400, int((~agrees & (confidence >= bar)).sum()), 0.95) >= 0.9

    assert certified(threshold)
    lower = confidence[confidence < threshold].max()
    assert not certified(lower)
    assert lower < threshold < confidence[confidence > lower].min()


def test_a_certificate_is_wrong_as_rarely_as_it_says():
    """The threshold is chosen on the very rows that certify it. A row's cheap answer is wrong with the probability
    1 - confidence, which is uniform from 0.5 to 1, so that a threshold t leaves (1 - t)^2 errors."""
    rng, wrong, draws = np.random.default_rng(1), 0, 3000
    for _ in range(draws):
        confidence = rng.uniform(0.5, 1, 300)
        agrees = rng.uniform(size=300) < confidence
        threshold = certified_threshold(confidence, agrees, 0.95, 0.9)
        wrong += (1 - max(threshold, 0.5)) ** 2 > 0.05
    assert 0.03 < wrong / draws < 0.1 + 3 * math.sqrt(0.09 / draws)


def test_rows_that_agree_need_no_full_pass():
    assert certified_threshold(np.full(300, 0.6), np.ones(300, bool), 0.99, 0.95) == 0.0


def test_too_few_rows_are_refused_with_the_number_it_takes():
    with pytest.raises(DataError, match="298 rows cannot certify 99% agreement .* it takes 299 rows without a"):
        certified_threshold(np.ones(298), np.ones(298, bool), 0.99, 0.95)


def test_sure_answers_that_are_wrong_are_refused():
    with pytest.raises(ModelError, match="no threshold certifies 90%"):
        certified_threshold(np.full(100, 0.9), np.arange(100) >= 50, 0.9, 0.95)


@pytest.mark.parametrize("wanted", [0, 1, -0.5, 99])
def test_an_agreement_that_no_rows_certify_is_refused(wanted):
    with pytest.raises(DataError, match="is no share that rows can certify"):
        certified_threshold(np.ones(400), np.ones(400, bool), wanted, 0.95)


def test_a_quantile_leaves_that_share_below_it():
    confidence = np.array([0.9, 0.5, 0.7, 0.6, 0.8])
    assert [(confidence < quantile(confidence, share)).sum() for share in (0, 0.2, 0.5, 0.6, 1)] == [0, 1, 3, 3, 5]
    assert (np.ones(4) < quantile(np.ones(4), 0.5)).sum() == 0


def test_confidence_is_the_largest_probability():
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0], [1000.0, 0.0], [25.0, 0.0]])
    found = confidence_of(logits)
    assert found[:3].tolist() == pytest.approx([0.5, 0.75, 1.0])
    assert found[3] < 1  # in float32 it were 1


# -- models ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pruned(trained):
    return prune_tokens(trained[0], [60, 40, 20])


def both(host, batch):
    with torch.no_grad():
        cheap = host.model(**batch).logits
        with all_tokens():
            return cheap, host.model(**batch).logits


def test_a_calibrated_cascade_agrees_on_fresh_rows(pruned, batches):
    cascade = calibrate(pruned, batches(300), 0.95)
    assert cascade.rows == 300
    assert cascade.agreement >= 0.95
    assert 0 < cascade.escalated < 0.6
    cheap = agreed = escalated = rows = 0
    for batch in batches(400, seed=8):
        found, (pruned_logits, full) = cascade.run(pruned.model, batch), both(pruned, batch)
        agreed += int((found.logits.argmax(1) == full.argmax(1)).sum())
        cheap += int((pruned_logits.argmax(1) == full.argmax(1)).sum())
        escalated, rows = escalated + int(found.escalated.sum()), rows + len(full)
    assert agreed / rows >= 0.95
    assert agreed > cheap
    assert escalated / rows == pytest.approx(cascade.escalated, abs=0.1)


def test_rows_below_the_threshold_get_the_full_pass_and_the_others_the_pruned_one(pruned, batches):
    (batch,) = batches(12)
    cheap, full = both(pruned, batch)
    threshold = float(confidence_of(cheap).median()) + 1e-9
    found = answer(pruned.model, batch, threshold)
    assert found.escalated.tolist() == (confidence_of(cheap) < threshold).tolist()
    assert 0 < found.escalated.sum() < 12
    expected = torch.where(found.escalated[:, None], full, cheap)
    assert (found.logits - expected).abs().max() < 1e-5
    assert (cheap - full).abs().max() > 1e-3


@pytest.mark.parametrize(("threshold", "is_full"), [(0.0, False), (2.0, True)])
def test_a_batch_of_one(pruned, batches, threshold, is_full):
    (batch,) = batches(1)
    found = answer(pruned.model, batch, threshold)
    assert found.escalated.tolist() == [is_full]
    assert torch.equal(found.logits, both(pruned, batch)[is_full])


def test_labels_and_positional_inputs_are_no_matter(pruned, batches):
    (batch,) = batches(3)
    expected = answer(pruned.model, batch, 2.0).logits
    labelled = answer(pruned.model, {**batch, "labels": torch.zeros(3, dtype=torch.long)}, 2.0)
    assert torch.equal(labelled.logits, expected)
    by_position = (batch["input_ids"], batch["attention_mask"])  # the first two that a BERT takes
    assert torch.equal(answer(pruned.model, by_position, 2.0).logits, expected)


def test_what_has_no_rows_stays_whole():
    given = {"x": torch.arange(6).view(3, 2), "table": torch.zeros(1, 5), "flag": True}
    found = rows_of(given, torch.tensor([2, 0]), 3)
    assert found["x"].tolist() == [[4, 5], [0, 1]]
    assert found["table"] is given["table"]
    assert found["flag"] is True


def test_a_share_to_escalate_needs_few_rows_and_certifies_nothing(pruned, batches):
    cascade = calibrate(pruned, batches(40), escalate=0.25)
    assert cascade.escalated == 0.25
    assert cascade.wanted is None
    assert "nothing is certified" in str(cascade)
    assert cascade.as_json().keys() == {"threshold", "escalated", "agreement", "rows"}
    assert calibrate(pruned, batches(40), escalate=0.0).threshold == 0.0
    assert calibrate(pruned, batches(40), escalate=1.0).agreement == 1.0


def test_threads_share_a_model(pruned, batches):
    given = batches(48, size=4)
    expected = [answer(pruned.model, batch, 0.6) for batch in given]
    found = [None] * len(given)

    def work(start):
        for i in range(start, len(given), 3):
            found[i] = answer(pruned.model, given[i], 0.6)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert any(a.escalated.any() for a in expected)
    assert all(torch.equal(a.escalated, b.escalated) for a, b in zip(expected, found, strict=True))
    assert all(torch.allclose(a.logits, b.logits, atol=1e-6) for a, b in zip(expected, found, strict=True))


def test_what_cannot_be_a_cascade_is_refused(trained, pruned, batches):
    with pytest.raises(ModelError, match="has none; make it with `secateur prune --tokens`"):
        calibrate(trained[0], batches(16))
    with pytest.raises(ModelError, match="has none; make it with `secateur prune --tokens`"):
        answer(zoo.bert(), batches(1)[0], 0.5)
    with pytest.raises(DataError, match="no rows to calibrate on"):
        calibrate(pruned, [])
    with pytest.raises(DataError, match=r"escalate 1.5 is no share of rows"):
        calibrate(pruned, batches(16), escalate=1.5)
    pruned.model.train()
    try:
        with pytest.raises(ModelError, match="training mode"):
            Cascade(0.5, 0.0, 1.0, 1).run(pruned.model, batches(1)[0])
    finally:
        pruned.model.eval()


def test_outputs_that_are_no_choice_are_refused(pruned, batches):
    pruned.model.config.problem_type = "multi_label_classification"
    try:
        with pytest.raises(ModelError, match="for multi_label_classification; use a classifier"):
            calibrate(pruned, batches(16))
    finally:
        pruned.model.config.problem_type = None
