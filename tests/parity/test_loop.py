"""Our loop = a plain torch loop, and 2n steps = n + save + load + n, both to the bit."""

import pytest
import torch
import torch.nn.functional as F

from trimtab import registry
from trimtab.seeding import derive_seed
from trimtab.storage import load_state, save_state
from trimtab.tasks.models import GPT, GPTConfig, digits_cnn, mlp
from trimtab.training.loop import TrainingLoop

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(params=["cpu", CUDA])
def device(request, monkeypatch):
    if request.param == "cpu":
        yield "cpu"
        return
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS may add up in another order
    torch.use_deterministic_algorithms(True)
    yield "cuda"
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder with a small text under the name of every text task."""
    root = tmp_path_factory.mktemp("data")
    words = ["to", "be", "or", "not", "that", "is", "the", "question"]
    picks = torch.randint(len(words), (3000,), generator=torch.Generator().manual_seed(0)).tolist()
    text = " ".join(words[pick] for pick in picks)
    for name in ("shakespeare_char/input.txt", "enwik8/enwik8", "text8/text8"):
        (root / name).parent.mkdir()
        (root / name).write_text(text)
    return root


def scoped_weights(seed, make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "weights"))
        return make()


def same(a, b):
    """Whether two nests are equal, tensors to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a.cpu(), b.cpu())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_digits_equal_a_plain_torch_loop_over_200_steps():
    task = registry.load("task", "digits-mlp")().replace(total_steps=200)
    data = task.load(None)
    loop = TrainingLoop(task, data, seed=3)
    ours = [loop.step().item() for _ in range(200)]

    model = scoped_weights(
        3, lambda: torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    order = torch.Generator().manual_seed(derive_seed(3, "data order"))
    theirs = []
    while len(theirs) < 200:
        rows = torch.randperm(1077, generator=order)
        for low in range(0, 1077 - 31, 32):
            batch = rows[low : low + 32]
            optimizer.zero_grad()
            loss = F.cross_entropy(model(data.train.inputs[batch]), data.train.targets[batch])
            loss.backward()
            optimizer.step()
            theirs.append(loss.item())
    assert ours == theirs[:200]
    # The plain loop ends with its epoch, ours in the middle of it.
    for _ in range(len(theirs) - 200):
        loop.step()
    assert all(map(torch.equal, loop.model.parameters(), model.parameters()))


@pytest.mark.parametrize(("dropout", "accumulation"), [(0.0, 1), (0.1, 2)])
def test_gpt_equals_a_plain_torch_loop_over_200_steps(texts, dropout, accumulation):
    shape = GPTConfig(65, 16, 1, 2, 16, dropout)
    task = registry.load("task", "shakespeare-gpt")("smoke").replace(
        make_model=lambda data: GPT(shape), block_size=16, batch_size=4, accumulation=accumulation, grad_clip=0.5
    )
    data = task.load(texts)
    loop = TrainingLoop(task, data, seed=3)
    ours = [loop.step().item() for _ in range(200)]

    model = scoped_weights(3, lambda: GPT(shape))
    decayed = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    plain = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))
    order = torch.Generator().manual_seed(derive_seed(3, "data order"))
    tokens, theirs = data.train.inputs, []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(3, "dropout"))
        for _ in range(200):
            losses = []
            for _ in range(accumulation):
                places = torch.randint(len(tokens) - 16, (4,), generator=order).tolist()
                x = torch.stack([tokens[place : place + 16].long() for place in places])
                y = torch.stack([tokens[place + 1 : place + 17].long() for place in places])
                loss = F.cross_entropy(model(x).view(-1, 65), y.view(-1))
                (loss / accumulation).backward()
                losses.append(loss.detach())
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            theirs.append(torch.stack(losses).mean().item())
    assert ours == theirs
    assert all(map(torch.equal, loop.model.parameters(), model.parameters()))


MODELS = {
    "digits-mlp": lambda data: mlp(64, [64], 10, dropout=0.3),
    "digits-cnn": lambda data: digits_cnn(10, dropout=0.3),
    "shakespeare-gpt": lambda data: GPT(GPTConfig(65, 32, 1, 2, 16, 0.1)),
    "enwik8-gpt": lambda data: GPT(GPTConfig(256, 32, 1, 2, 16, 0.1)),
    "text8-gpt": lambda data: GPT(GPTConfig(27, 32, 1, 2, 16, 0.1)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_2n_steps_equal_n_save_load_n(name, optimizer, texts, tmp_path, device):
    task = registry.load("task", name)("smoke")
    task = task.replace(make_model=MODELS[name], accumulation=2, optimizer=optimizer, momentum=0.9, grad_clip=1.0)
    data = task.load(texts)
    n = 25  # 50 micro-batches of 33 an epoch: saved in the middle of the second
    whole = TrainingLoop(task, data, seed=1, device=device)
    expected = [whole.step().item() for _ in range(2 * n)]

    first = TrainingLoop(task, data, seed=1, device=device)
    losses = [first.step().item() for _ in range(n)]
    first.evaluate("test")
    save_state(tmp_path / "state.safetensors", first.state_dict())
    second = TrainingLoop(task, data, seed=7, device=device)  # nothing of its own start must be left
    second.step()
    second.load_state_dict(load_state(tmp_path / "state.safetensors"))
    assert (second.steps_done, second.samples_seen, second.test_reads) == (n, 2 * n * task.batch_size, 1)
    losses += [second.step().item() for _ in range(n)]
    assert losses == expected
    assert same(second.state_dict() | {"test_reads": 0}, whole.state_dict())
    assert second.evaluate("val") == whole.evaluate("val")


def test_a_changed_rate_is_part_of_the_state(texts, tmp_path):
    task = registry.load("task", "digits-mlp")("smoke")
    loop = TrainingLoop(task, task.load(None), seed=1)
    loop.optimizer.param_groups[0]["lr"] = 0.0123
    save_state(tmp_path / "state", loop.state_dict())
    other = TrainingLoop(task, task.load(None), seed=1)
    other.load_state_dict(load_state(tmp_path / "state"))
    assert other.optimizer.param_groups[0]["lr"] == 0.0123


@pytest.mark.gpu
def test_a_step_on_cuda_does_not_wait_for_the_device(texts):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for name in ("digits-mlp", "shakespeare-gpt"):
        task = registry.load("task", name)("smoke").replace(make_model=MODELS[name])
        loop = TrainingLoop(task, task.load(texts), seed=0, device="cuda", precision="auto")
        loop.step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(5):
                loop.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
