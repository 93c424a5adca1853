"""A schedule comes on and goes off without a trace, and forward passes do not meet."""

import copy
import threading

import pytest
import torch

from secateur.errors import ModelError
from secateur.token_schedule import TokenSchedule, schedule_of
from secateur.torch.tokens.call import running
from secateur.torch.tokens.install import all_tokens, install, remove, tokens_of, using_scores
from secateur.torch.tokens.sites import TokenSites
from tests import zoo
from tests.torch.tokens import by_hand
from tests.torch.tokens.test_pruning import padded, with_schedule


def answer(model, batch):
    with torch.no_grad():
        return model(*batch).logits


def hooks_of(model):
    found = {}
    for name, module in model.named_modules():
        tables = {key: value for key, value in vars(module).items() if "_hooks" in key and isinstance(value, dict)}
        found |= {(name, key): dict(value) for key, value in tables.items() if value}
    return found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_schedule_that_is_taken_off_leaves_nothing_behind(attention):
    model, batch = zoo.bert(attn_implementation=attention), padded([20, 9])
    model.set_attn_implementation(attention)
    block, seen = model.bert.encoder.layer[1], []
    block.register_forward_hook(lambda *_: seen.append(1))
    before, hooks, attributes = answer(model, batch), hooks_of(model), set(vars(model))
    with_schedule(model, "fast", by_hand.BERT)
    assert tokens_of(model).schedule == schedule_of("fast", 3)
    assert not torch.equal(answer(model, batch), before)
    remove(model)
    assert tokens_of(model) is None
    assert torch.equal(answer(model, batch), before)
    assert hooks_of(model) == hooks
    assert set(vars(model)) == attributes
    assert model.config._attn_implementation == attention
    assert len(seen) == 3
    remove(model)  # a second time changes nothing
    assert torch.equal(answer(model, batch), before)


def test_a_schedule_takes_the_place_of_the_one_before():
    model, other, batch = zoo.bert(), zoo.bert(), padded([20, 9])
    with_schedule(with_schedule(model, "fast", by_hand.BERT), "mild", by_hand.BERT)
    with_schedule(other, "mild", by_hand.BERT)
    assert torch.equal(answer(model, batch), answer(other, batch))
    assert len(hooks_of(model)) == len(hooks_of(other))
    remove(model)
    assert model.config._attn_implementation == "sdpa"


def test_a_context_scores_and_gives_the_attention_back():
    model = zoo.bert()
    with pytest.raises(KeyError), using_scores(model):
        assert model.config._attn_implementation != "sdpa"
        raise KeyError
    assert model.config._attn_implementation == "sdpa"


def test_all_tokens_pass_in_a_context_of_this_thread_alone():
    model, batch = zoo.bert(), padded([20, 9])
    dense = answer(model, batch)
    pruned = answer(with_schedule(model, "fast", by_hand.BERT), batch)
    other = []
    with all_tokens():
        assert torch.equal(answer(model, batch), dense)
        assert len(model(*batch, output_hidden_states=True).hidden_states) == 4
        thread = threading.Thread(target=lambda: other.append(answer(model, batch)))
        thread.start()
        thread.join()
    assert torch.equal(other[0], pruned)
    assert torch.equal(answer(model, batch), pruned)


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_states_and_attentions_of_blocks_are_refused(name):
    model, batch = with_schedule(zoo.bert(), "fast", by_hand.BERT), padded([9])
    said = f"blocks have no common length and {name} cannot be given; leave it out"
    with pytest.raises(ModelError, match=said):
        model(*batch, **{name: True})
    assert running() is None


def test_a_config_that_asks_for_states_or_attentions_is_refused():
    model, batch = with_schedule(zoo.bert(), "fast", by_hand.BERT), padded([9])
    model.config.output_hidden_states = True
    with pytest.raises(ModelError, match="output_hidden_states cannot be given; leave it out"):
        model(*batch)
    other = zoo.bert(attn_implementation="eager", output_attentions=True)
    with pytest.raises(ModelError, match="config asks for output_attentions.*set it to False"):
        with_schedule(other, "fast", by_hand.BERT)


def test_eight_threads_on_one_model_give_what_one_gives():
    model = with_schedule(zoo.bert(), "fast", by_hand.BERT)
    batches = [padded([5 + 3 * number, 4 + number], seed=number) for number in range(8)]
    expected = [answer(model, batch) for batch in batches]
    wrong, start = [], threading.Barrier(8)

    def work(number):
        start.wait()
        for _ in range(10):
            if not torch.equal(answer(model, batches[number]), expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_model_inside_a_hook_of_another_has_a_call_of_its_own():
    outer, batch = with_schedule(zoo.bert(), "fast", by_hand.BERT), padded([20, 9])
    inner = with_schedule(zoo.bert(num_hidden_layers=3), "mild", by_hand.BERT)
    expected, inside, found = answer(outer, batch), answer(inner, batch), []
    outer.bert.encoder.layer[1].register_forward_pre_hook(lambda *_: found.append(answer(inner, batch)))
    assert torch.equal(answer(outer, batch), expected)
    assert torch.equal(found[0], inside)


def test_a_copy_runs_alone():
    model, batch = zoo.bert(), padded([20, 9])
    dense = answer(model, batch)
    pruned = answer(with_schedule(model, "fast", by_hand.BERT), batch)
    twin = copy.deepcopy(model)
    remove(model)
    assert torch.equal(answer(model, batch), dense)
    assert torch.equal(answer(twin, batch), pruned)
    remove(twin)
    assert torch.equal(answer(twin, batch), dense)
    assert hooks_of(twin) == {}


@pytest.mark.parametrize("where", ["bert.encoder.layer.1.intermediate", "bert.encoder.layer.0", "bert.encoder", "bert"])
def test_an_error_on_the_way_leaves_no_call_behind(where):
    model, batch = with_schedule(zoo.bert(), "fast", by_hand.BERT), padded([20, 9])
    expected = answer(model, batch)

    def fail(*_):
        raise KeyError("no")

    handle = model.get_submodule(where).register_forward_pre_hook(fail, prepend=True)
    for _ in range(2):
        with pytest.raises(KeyError):
            model(*batch)
        assert running() is None
    handle.remove()
    assert torch.equal(answer(model, batch), expected)


def test_an_error_in_an_inner_model_does_not_end_the_call_of_the_outer_one():
    outer, batch = with_schedule(zoo.bert(), "fast", by_hand.BERT), padded([20, 9])
    inner, expected = with_schedule(zoo.bert(), "mild", by_hand.BERT), answer(outer, batch)

    def fail(*_):
        raise KeyError("no")

    def call_inner(*_):
        with pytest.raises(KeyError):
            inner(*batch)

    inner.bert.encoder.register_forward_pre_hook(fail, prepend=True)
    outer.bert.encoder.layer[1].register_forward_pre_hook(call_inner)
    assert torch.equal(answer(outer, batch), expected)


def test_training_with_a_schedule_on_has_gradients():
    model, (ids, mask) = with_schedule(zoo.bert(), "fast", by_hand.BERT), padded([20, 9])
    model.train()
    model(ids, mask, labels=torch.tensor([0, 1])).loss.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert missing == []
    assert all(block.intermediate.dense.weight.grad.abs().sum() > 0 for block in model.bert.encoder.layer)


def test_gradients_are_those_of_the_loop():
    model, (ids, mask) = zoo.bert(), padded([20, 9])
    by_hand.bert(model, ids, mask, schedule_of("fast", 3).keep).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with_schedule(model, "fast", by_hand.BERT)
    model(ids, mask).logits.sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_is_refused_in_a_sentence():
    model, (ids, mask) = with_schedule(zoo.bert(), "fast", by_hand.BERT), padded([20, 9])
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(ModelError, match="ran outside its model, as gradient checkpointing does"):
        model(ids, mask, labels=torch.tensor([0, 1])).loss.backward()


def test_a_block_alone_is_refused_and_runs_without_the_schedule():
    model = with_schedule(zoo.bert(), "fast", by_hand.BERT)
    block, states = model.bert.encoder.layer[0], torch.randn(1, 5, 32)
    with pytest.raises(ModelError, match="a BertLayer with a schedule of tokens ran outside its model"):
        block(states)
    remove(model)
    assert block(states) is not None


@pytest.mark.parametrize(
    ("schedule", "stack", "said"),
    [
        (TokenSchedule((100, 50)), "bert.encoder.layer", "is for 2 blocks, which bert.encoder.layer does not hold"),
        (TokenSchedule((100, 50, 50)), "bert.encoder", "which bert.encoder does not hold"),
    ],
)
def test_a_schedule_that_does_not_fit_leaves_the_model_as_it_was(schedule, stack, said):
    model = zoo.bert()
    with pytest.raises(ModelError, match=said):
        install(model, schedule, TokenSites(stack, "attention", "", {}))
    assert hooks_of(model) == {}
    assert model.config._attn_implementation == "sdpa"


def test_an_argument_that_was_not_there_before_is_refused_by_name():
    sites = TokenSites("bert.encoder.layer", "attention", "", {"[0][1]": (2, 3)})
    model, batch = with_schedule(zoo.bert(), "fast", sites), padded([9])
    model.bert.encoder.layer[2].register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "more": torch.ones(1, 9)}), with_kwargs=True, prepend=True
    )
    with pytest.raises(ModelError, match="a block is called with .*more.*make the schedule anew"):
        model(*batch)


def test_sites_are_read_from_json_as_they_were_written():
    assert TokenSites.from_json(by_hand.MODERNBERT.to_json()) == by_hand.MODERNBERT


@pytest.mark.parametrize(
    "changed",
    [
        {"stack": ""},
        {"stack": 3},
        {"stack": "a b"},
        {"inner": "x/y"},
        {"arguments": []},
        {"arguments": {"[0][1]": 2}},
        {"arguments": {"[0][1]": [-1]}},
        {"arguments": {"[0][1]": [True]}},
        {"more": 1},
    ],
)
def test_damaged_sites_are_refused(changed):
    with pytest.raises(ModelError, match="sites of a schedule"):
        TokenSites.from_json({**by_hand.BERT.to_json(), **changed})
