"""How a program is compared with its model: over all data, whatever the batches; generation step by step."""

import numpy as np
import pytest
import torch

from secateur.deploy.jobs import comparison, generation
from secateur.deploy.jobs.comparison import Comparison
from secateur.deploy.target import DeployError
from tests import zoo

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(40, 3)).astype(np.float32)
NOISE = RNG.normal(size=(40, 3)).astype(np.float32) * 1e-3


def compared(rows, expected=LOGITS, got=None, mask=None, tolerance=1.0):
    got = expected + NOISE if got is None else got
    made = Comparison("PyTorch", DeployError)
    for start in range(0, len(expected), rows):
        part = slice(start, start + rows)
        made.ran(str(rows), len(expected[part]))
        made.add({"logits": expected[part]}, {"logits": got[part]}, ranked=["logits"], mask=mask)
    return made.parity(tolerance)


def test_batches_change_nothing(monkeypatch):
    whole = compared(40)
    for rows in (1, 3, 7):
        parity = compared(rows)
        assert parity.relative_error == pytest.approx(whole.relative_error, rel=1e-6)
        assert (parity.worst_logit, parity.agreement, parity.examples) == (whole.worst_logit, whole.agreement, 40)
    assert whole.relative_error <= 5e-3
    monkeypatch.setattr(comparison, "HELD", 30)  # in parts where there is much data
    assert compared(1).relative_error == pytest.approx(whole.relative_error, rel=1)
    wrong = LOGITS.copy()
    wrong[37, 1] += 1
    with pytest.raises(DeployError, match="differs from PyTorch by .* of its logits"):
        compared(1, got=wrong, tolerance=1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_count_on_either_side(bad):
    other = LOGITS.copy()
    other[3, 1] = bad
    for expected, got in ((LOGITS, other), (other, LOGITS)):
        with pytest.raises(DeployError, match="differs from PyTorch by inf of its logits"):
            compared(8, expected, got)
    assert compared(8, other, other).relative_error == 0.0
    with pytest.raises(DeployError, match="NaN proves nothing"):
        compared(8, np.full_like(LOGITS, np.nan), np.full_like(LOGITS, np.nan))


def test_padded_positions_are_left_out():
    mask = np.array([[True, True, False], [True, False, False]])
    expected = RNG.normal(size=(2, 3, 4))
    got = np.where(mask[..., None], expected, 1e6)
    assert compared(2, expected, got, mask).relative_error == 0.0
    got[1, 0, 2] += 1
    with pytest.raises(DeployError, match="differs from PyTorch"):
        compared(2, expected, got, mask, tolerance=1e-4)


def test_whole_numbers_are_compared():
    ids = np.arange(6).reshape(2, 3)
    assert compared(2, ids, ids.astype(np.int32)).relative_error == 0.0
    with pytest.raises(DeployError, match="differs from PyTorch by inf of its logits"):
        compared(2, ids, ids + (ids == 4))


def test_a_program_without_outputs_is_refused():
    made = Comparison("PyTorch", DeployError)
    made.ran("1", 1)
    made.add({}, {})
    with pytest.raises(DeployError, match="no numbers that could be compared"):
        made.parity(1.0)


# -- generation -------------------------------------------------------------------------------------------------------


@pytest.fixture
def generating(monkeypatch):
    """`generation.compare` with the model itself as the artefact, whose logits `change(step, logits)` replaces."""
    model = zoo.llama(num_hidden_layers=1)
    inputs = {key: value[:1] for key, value in zoo.inputs(model).items()}

    def compare(change, tolerance=1e-4, *, rounded=False):
        def unended(folder, given, count, seen, chosen, answers):
            options = {"do_sample": False, "max_new_tokens": count, "min_new_tokens": count}
            made = model.generate(**given, **options, output_logits=True, return_dict_in_generate=True)
            for step, logits in enumerate(made.logits):
                changed = change(step, logits.numpy().copy())
                if changed is not None:
                    seen.append(changed)
            chosen.extend(made.sequences[:, -count:].T.numpy())
            return made.sequences.numpy()

        monkeypatch.setattr(generation, "_unended", unended)
        return generation.compare(model, None, inputs, tolerance, rounded=rounded)

    return compare


def changed(at, value):
    def change(step, logits):
        if step == at:
            logits[0, 4] = value(logits)
        return logits

    return change


def test_generation_is_compared_step_by_step(generating):
    same = generating(lambda step, logits: logits)
    assert same == {"tokens": generation.NEW_TOKENS, "equal": True, "agreement": 1.0, "relative_error": 0.0}
    for step in (0, 13, generation.NEW_TOKENS - 1):
        with pytest.raises(DeployError, match=r"the same tokens, logits by .* of their scale"):
            generating(changed(step, lambda logits: logits[0, 4] + 0.01))
        for value in (np.nan, -np.inf, -1e9):
            with pytest.raises(DeployError, match="generation differs from PyTorch"):
                generating(changed(step, lambda logits, value=value: value), 0.1, rounded=True)
    with pytest.raises(DeployError, match=f"logits of step {generation.NEW_TOKENS - 1} is an output of one model only"):
        generating(lambda step, logits: logits if step < generation.NEW_TOKENS - 1 else None)
    with pytest.raises(DeployError, match=r"logits of step 0 has shape \(1, 50\) in one model and \(1, 49\)"):
        generating(lambda step, logits: logits[:, :49])
    assert torch.is_grad_enabled()
