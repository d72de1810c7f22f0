"""TrainingLoop: clipping, counting, evaluation, randomness, what it refuses."""

import math

import pytest
import torch
from sklearn.metrics import f1_score
from torch import nn

from trimtab import registry
from trimtab.errors import InputError, UnknownNameError
from trimtab.seeding import derive_seed
from trimtab.tasks.base import Data, Split, Task
from trimtab.tasks.models import GPT, GPTConfig, mlp
from trimtab.training.loop import TrainingLoop, make_optimizer


@pytest.fixture(scope="module")
def digits():
    return registry.load("task", "digits-mlp")("smoke").load(None)


def digits_task(**changes):
    return registry.load("task", "digits-mlp")("smoke").replace(**changes)


def with_dropout(data):
    return mlp(64, [64], 10, dropout=0.3)


def text_data(n_tokens=4000):
    tokens = torch.randint(7, (n_tokens,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    none = torch.empty(0)
    cut = n_tokens * 9 // 10
    return Data(Split(tokens[:cut], none), Split(tokens[cut:], none), Split(tokens[cut:], none), {"vocab_size": 7})


def text_task(**changes):
    shape = GPTConfig(7, 16, 1, 2, 16, dropout=changes.pop("dropout", 0.0))
    settings = {"batch_size": 4, "block_size": 16, "eval_batches": 3, "test_batches": 5, "optimizer": "adamw"}
    return Task("text", "none", "language-modelling", lambda path: text_data(), lambda data: GPT(shape),
                **(settings | changes))  # fmt: skip


def weights(loop):
    return torch.cat([parameter.detach().flatten() for parameter in loop.model.parameters()])


def test_clipping_holds_the_gradient_at_the_stated_norm(digits):
    free, clipped = (TrainingLoop(digits_task(grad_clip=clip), digits, seed=0) for clip in (None, 0.01))
    norms = []
    for loop in (free, clipped):
        loop.step()
        norms.append(torch.stack([parameter.grad.norm() for parameter in loop.model.parameters()]).norm().item())
    assert norms[0] > 0.1
    assert norms[1] == pytest.approx(0.01, rel=1e-3)


def test_accumulation_averages_gradients_and_losses(digits):
    sgd = {"optimizer": "sgd", "lr": 0.1}
    whole = TrainingLoop(digits_task(batch_size=64, **sgd), digits, seed=0)
    parts = TrainingLoop(digits_task(batch_size=32, accumulation=2, **sgd), digits, seed=0)
    losses = [loop.step().item() for loop in (whole, parts)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    torch.testing.assert_close(weights(parts), weights(whole), rtol=1e-5, atol=1e-7)
    assert whole.samples_seen == parts.samples_seen == 64


def test_a_step_returns_a_scalar_tensor_and_leaves_gradients_readable(digits):
    loop = TrainingLoop(digits_task(), digits, seed=0)
    loss = loop.step()
    assert (loss.shape, loss.requires_grad, type(loss)) == (torch.Size([]), False, torch.Tensor)
    assert all(parameter.grad is not None for parameter in loop.model.parameters())


def test_steps_samples_epochs_and_the_end_are_counted(digits):
    loop = TrainingLoop(digits_task(total_steps=34, batch_size=32), digits, seed=0)
    for _ in range(33):
        loop.step()
    assert (loop.steps_done, loop.samples_seen, loop.epoch, loop.total_steps) == (33, 1056, 1.0, 34)
    assert not loop.is_over()
    loop.step()
    assert loop.is_over()
    text = TrainingLoop(text_task(), text_data(), seed=0)
    text.step()
    assert text.epoch == pytest.approx(4 * 16 / 3600)


def test_what_is_written_to_the_optimizer_acts_at_the_next_step(digits):
    kept, changed = (TrainingLoop(digits_task(), digits, seed=0) for _ in range(2))
    for loop in (kept, changed):
        loop.step()
    changed.optimizer.param_groups[0]["lr"] = 0.0
    before = weights(changed).clone()
    changed.step()
    kept.step()
    assert torch.equal(weights(changed), before)
    assert not torch.equal(weights(kept), before)


def test_a_seed_decides_weights_order_and_dropout(digits):
    task = digits_task(make_model=with_dropout)
    first, again, other = (TrainingLoop(task, digits, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(weights(first), weights(again))
    assert not torch.equal(weights(first), weights(other))
    losses = [[loop.step().item() for _ in range(40)] for loop in (first, again, other)]
    assert losses[0] == losses[1] != losses[2]


def test_the_start_does_not_depend_on_settings_of_the_arm(digits):
    one = TrainingLoop(digits_task(), digits, seed=1)
    other = TrainingLoop(digits_task(optimizer="sgd", lr=0.5, total_steps=9), digits, seed=1)
    assert torch.equal(weights(one), weights(other))
    assert one.step().item() == other.step().item()


def test_dropout_is_drawn_from_the_run_and_global_state_is_left_alone(digits):
    loop = TrainingLoop(digits_task(make_model=with_dropout), digits, seed=1)
    reference = TrainingLoop(digits_task(make_model=with_dropout), digits, seed=1)
    before = torch.get_rng_state()
    losses = [loop.step().item() for _ in range(5)]
    assert torch.equal(torch.get_rng_state(), before)
    disturbed = []
    for _ in range(5):
        torch.rand(3)
        disturbed.append(reference.step().item())
    assert disturbed == losses
    assert len({loop.step().item() for _ in range(2)}) == 2


@pytest.mark.parametrize("model", [with_dropout, lambda data: nn.Sequential(nn.Unflatten(1, (8, 8)), _Last())])
def test_every_place_of_dropout_is_found(digits, model):
    loop = TrainingLoop(digits_task(make_model=model), digits, seed=1)
    before = torch.get_rng_state()
    loop.step()
    assert torch.equal(torch.get_rng_state(), before)


class _Last(nn.Module):
    """An LSTM, whose dropout is a number and no module."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(8, 10, num_layers=2, batch_first=True, dropout=0.5)

    def forward(self, x):
        return self.lstm(x)[0][:, -1]


@pytest.mark.parametrize("kind", ["digits", "text"])
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_evaluation_moves_neither_weights_nor_random_state(digits, kind, split):
    if kind == "digits":
        loops = [TrainingLoop(digits_task(make_model=with_dropout), digits, seed=1) for _ in range(2)]
    else:
        loops = [TrainingLoop(text_task(dropout=0.2), text_data(), seed=1) for _ in range(2)]
    plain, evaluated = loops
    for _ in range(7):
        plain.step()
        evaluated.step()
        global_state, before = torch.get_rng_state(), weights(evaluated).clone()
        measured = [evaluated.evaluate(split) for _ in range(2)]
        assert measured[0] == measured[1]
        assert torch.equal(weights(evaluated), before)
        assert torch.equal(torch.get_rng_state(), global_state)
    assert evaluated.model.training
    assert torch.equal(weights(plain), weights(evaluated))
    assert plain.step().item() == evaluated.step().item()


def test_evaluation_is_without_dropout(digits):
    loop = TrainingLoop(digits_task(make_model=with_dropout), digits, seed=1)
    measured = loop.evaluate("val")["loss"]
    with torch.no_grad():
        first, _, _, last = loop.model
        logits = last(first(digits.val.inputs).relu())
    assert measured == pytest.approx(nn.functional.cross_entropy(logits, digits.val.targets).item(), rel=1e-6)


def test_a_model_that_draws_while_it_is_evaluated_moves_no_global_state(digits):
    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(x) + torch.rand(1)

    loop = TrainingLoop(digits_task(make_model=lambda data: Noisy(64, 10)), digits, seed=1)
    before = torch.get_rng_state()
    loop.evaluate("val")
    assert torch.equal(torch.get_rng_state(), before)


def test_measures_of_a_classification_are_the_known_formulas(digits):
    loop = TrainingLoop(digits_task(), digits, seed=0)
    for _ in range(20):
        loop.step()
    measured = loop.evaluate("val")
    with torch.no_grad():
        logits = loop.model(digits.val.inputs)
    guess = logits.argmax(1)
    assert set(measured) == {"loss", "accuracy", "f1", "n_samples", "n_batches"}
    assert measured["loss"] == pytest.approx(nn.functional.cross_entropy(logits, digits.val.targets).item(), rel=1e-6)
    assert measured["accuracy"] == pytest.approx((guess == digits.val.targets).float().mean().item())
    assert measured["f1"] == pytest.approx(f1_score(digits.val.targets, guess, average="macro"), rel=1e-9)
    assert (measured["n_samples"], measured["n_batches"]) == (360, 3)


def test_one_logit_is_measured_as_two_classes():
    inputs = torch.tensor([[2.0], [-1.0], [-3.0], [0.5]])
    split = Split(inputs, torch.tensor([1, 1, 0, 0]))
    task = Task("t", "none", "classification", lambda path: None, lambda data: nn.Linear(1, 1), batch_size=4, lr=0.1)
    loop = TrainingLoop(task, Data(split, split, split, {"n_classes": 2}), seed=0)
    with torch.no_grad():
        loop.model.weight.fill_(1.0)
        loop.model.bias.zero_()
    measured = loop.evaluate("val")
    losses = [math.log1p(math.exp(-x)) for x in (2.0, -1.0, 3.0, -0.5)]
    assert measured["loss"] == pytest.approx(sum(losses) / 4, rel=1e-6)
    assert (measured["accuracy"], measured["f1"]) == (0.5, 0.5)
    assert loop.step().item() == pytest.approx(measured["loss"], rel=1e-6)
    assert loop.evaluate("train")["loss"] < measured["loss"]


def test_one_logit_for_ten_classes_is_refused(digits):
    loop = TrainingLoop(digits_task(make_model=lambda data: nn.Linear(64, 1)), digits, seed=0)
    with pytest.raises(InputError, match="the network has one output, which tells two classes apart, and there are 10"):
        loop.evaluate("val")


def test_f1_leaves_out_classes_that_never_occur():
    inputs = torch.eye(3)[[0, 0, 1, 1]]
    split = Split(inputs, torch.tensor([0, 0, 1, 0]))
    task = Task("t", "none", "classification", lambda path: None, lambda data: nn.Linear(3, 3), batch_size=2)
    loop = TrainingLoop(task, Data(split, split, split, {"n_classes": 3}), seed=0)
    with torch.no_grad():
        loop.model.weight.copy_(torch.eye(3))
        loop.model.bias.zero_()
    measured = loop.evaluate("val")
    assert measured["accuracy"] == 0.75
    assert measured["f1"] == pytest.approx((0.8 + 2 / 3) / 2)


def test_a_regression_is_measured_by_its_squared_error():
    inputs = torch.tensor([[1.0], [2.0], [3.0]])
    split = Split(inputs, 2 * inputs[:, 0])
    task = Task("r", "none", "regression", lambda path: None, lambda data: nn.Linear(1, 1, bias=False),
                optimizer="sgd", lr=0.05, batch_size=3)  # fmt: skip
    loop = TrainingLoop(task, Data(split, split, split, {}), seed=0)
    with torch.no_grad():
        loop.model.weight.fill_(1.0)
    assert loop.evaluate("val") == {"loss": pytest.approx(14 / 3), "mse": pytest.approx(14 / 3), "n_samples": 3,
                                    "n_batches": 1}  # fmt: skip
    loop.step()
    assert loop.model.weight.item() == pytest.approx(1 + 0.05 * 2 * 14 / 3)


def test_text_is_measured_over_fixed_windows():
    loop = TrainingLoop(text_task(), text_data(), seed=0)
    measured = loop.evaluate("val")
    assert (measured["n_samples"], measured["n_batches"], measured["n_tokens"]) == (12, 3, 192)
    assert loop.evaluate("test")["n_batches"] == 5
    assert measured["loss"] == pytest.approx(math.log(7), abs=0.1)
    other_seed = TrainingLoop(text_task(), text_data(), seed=5)
    other_seed.model.load_state_dict(loop.model.state_dict())
    assert other_seed.evaluate("val") == measured


def test_reads_of_the_test_split_are_counted(digits):
    loop = TrainingLoop(digits_task(), digits, seed=0)
    loop.evaluate("val")
    assert loop.test_reads == 0
    loop.evaluate("test")
    loop.evaluate("test")
    assert loop.test_reads == 2
    assert loop.state_dict()["test_reads"] == 2


def test_adamw_has_two_groups_and_the_others_one():
    model = GPT(GPTConfig(7, 16, 2, 2, 16, bias=True))
    optimizer = make_optimizer(text_task(weight_decay=0.1), model)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert {parameter.dim() for parameter in optimizer.param_groups[0]["params"]} == {2}
    assert {parameter.dim() for parameter in optimizer.param_groups[1]["params"]} == {1}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    for name, kind in (("sgd", torch.optim.SGD), ("adam", torch.optim.Adam)):
        other = make_optimizer(text_task(optimizer=name, weight_decay=0.1), model)
        assert type(other) is kind
        assert [group["weight_decay"] for group in other.param_groups] == [0.1]
    assert make_optimizer(text_task(optimizer="sgd", momentum=0.9), model).param_groups[0]["momentum"] == 0.9


def test_adamw_leaves_out_an_empty_group():
    model = nn.Linear(2, 2, bias=False)
    assert len(make_optimizer(text_task(), model).param_groups) == 1


def test_bf16_trains_float32_weights_and_auto_is_float32_on_the_cpu(digits):
    loop = TrainingLoop(digits_task(), digits, seed=0, precision="bf16")
    exact = TrainingLoop(digits_task(), digits, seed=0, precision="auto")
    assert (loop.precision, exact.precision) == ("bf16", "float32")
    losses = [run.step().item() for run in (loop, exact)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert {parameter.dtype for parameter in loop.model.parameters()} == {torch.float32}
    assert loop.evaluate("val")["loss"] == pytest.approx(exact.evaluate("val")["loss"], rel=0.02)


def test_what_cannot_be_is_refused(digits, monkeypatch):
    with pytest.raises(UnknownNameError, match="unknown precision 'fp32'"):
        TrainingLoop(digits_task(), digits, seed=0, precision="fp32")
    with pytest.raises(InputError, match="unknown device 'gpu'; expected cpu, cuda or cuda:N"):
        TrainingLoop(digits_task(), digits, seed=0, device="gpu")
    with pytest.raises(InputError, match="device 'meta' cannot be used"):
        TrainingLoop(digits_task(), digits, seed=0, device="meta")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InputError, match="there is no device 'cuda': torch sees 0 CUDA devices; use cpu"):
        TrainingLoop(digits_task(), digits, seed=0, device="cuda")
    with pytest.raises(InputError, match="batch_size 2000 is more than the 1077 train samples; make it smaller"):
        TrainingLoop(digits_task(batch_size=2000), digits, seed=0)
    with pytest.raises(UnknownNameError, match=r"unknown split 'valid'; did you mean 'val'\? known: test, train, val"):
        TrainingLoop(digits_task(), digits, seed=0).evaluate("valid")


def test_a_state_of_another_run_is_refused(digits):
    loop = TrainingLoop(digits_task(), digits, seed=0)
    state = loop.state_dict()
    with pytest.raises(InputError, match="the state is of task 'digits-mlp', the loop runs 'text'"):
        TrainingLoop(text_task(), text_data(), seed=0).load_state_dict(state)
    wide = TrainingLoop(digits_task(make_model=lambda data: mlp(64, [65], 10)), digits, seed=0)
    with pytest.raises(InputError, match="the state does not fit the model of task 'digits-mlp'"):
        wide.load_state_dict(state)
    with pytest.raises(InputError, match="the state was saved on another kind of device than cpu"):
        loop.load_state_dict(state | {"dropout": [*state["dropout"], torch.zeros(1)]})
    smaller = Data(Split(digits.train.inputs[:99], digits.train.targets[:99]), digits.val, digits.test, digits.info)
    loop.step()
    with pytest.raises(InputError, match="the state holds an order of 1077 samples, the train split 99"):
        TrainingLoop(digits_task(), smaller, seed=0).load_state_dict(loop.state_dict())


def test_a_held_state_is_not_changed_by_further_steps_and_can_be_loaded_twice(digits):
    loop = TrainingLoop(digits_task(make_model=with_dropout), digits, seed=0)
    for _ in range(5):
        loop.step()
    state = loop.state_dict()
    runs = []
    for _ in range(3):
        runs.append([loop.step().item() for _ in range(40)])
        loop.load_state_dict(state)
    assert runs[0] == runs[1] == runs[2]
    assert loop.steps_done == 5


def test_the_streams_of_randomness_are_apart():
    seeds = {derive_seed(0, name) for name in ("data order", "weights", "dropout")}
    assert len(seeds) == 3
