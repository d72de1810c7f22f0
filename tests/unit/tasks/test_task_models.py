"""The networks: sizes in closed form, the causal mask, the initialisation, sampling."""

import math

import pytest
import torch

from trimtab.errors import InputError
from trimtab.tasks.models import GPT, GPTConfig, digits_cnn, mlp, mnist_cnn

TINY = GPTConfig(vocab_size=11, block_size=8, n_layer=2, n_head=2, n_embd=16)


@pytest.fixture(autouse=True)
def _fixed_weights():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def closed_form(c: GPTConfig) -> int:
    """Token embedding (tied), the blocks, the last norm; no position embedding."""
    width, bias = c.n_embd, int(c.bias)
    norm = width * (1 + bias)
    attention = 4 * width**2 + bias * 4 * width
    feed_forward = 8 * width**2 + bias * 5 * width
    return c.vocab_size * width + c.n_layer * (2 * norm + attention + feed_forward) + norm


@pytest.mark.parametrize("config", [TINY, GPTConfig(65, 64, 4, 4, 128), GPTConfig(7, 5, 3, 1, 12, 0.1, bias=True)])
def test_gpt_has_as_many_parameters_as_the_closed_form_says(config):
    model = GPT(config)
    assert model.n_parameters() == closed_form(config)
    assert model.n_parameters(with_positions=True) == closed_form(config) + config.block_size * config.n_embd


def test_the_full_preset_has_nanogpts_10_65_million():
    with torch.device("meta"):
        model = GPT(GPTConfig(65, 256, 6, 6, 384, 0.2))
    assert model.n_parameters() == 10_646_784
    assert f"{model.n_parameters() / 1e6:.2f}M" == "10.65M"


def test_plain_networks_have_their_published_sizes():
    assert count(mlp(64, [64], 10)) == 64 * 64 + 64 + 64 * 10 + 10
    assert count(mnist_cnn(10)) == 1_199_882  # PyTorch's MNIST example
    assert count(digits_cnn(10)) == 160 + 4640 + 1290
    assert [type(layer).__name__ for layer in mlp(4, [3], 2, dropout=0.5)] == [
        "Linear",
        "ReLU",
        "Dropout",
        "Linear",
    ]


def test_a_later_token_does_not_reach_earlier_logits():
    model = GPT(TINY).eval()
    tokens = torch.randint(11, (3, 8))
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 11
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert ((before - after)[:, 5:].abs().amax(dim=(0, 2)) > 0).all()


def test_attention_equals_the_formula():
    model = GPT(TINY).eval()
    attention = model.blocks[0].attention
    x = torch.randn(2, 8, 16)
    q, k, v = attention.qkv(x).split(16, dim=2)
    q, k, v = (part.view(2, 8, 2, 8).transpose(1, 2) for part in (q, k, v))
    scores = q @ k.transpose(2, 3) / math.sqrt(8)
    scores = scores.masked_fill(torch.ones(8, 8).triu(1).bool(), -math.inf).softmax(-1)
    expected = attention.projection((scores @ v).transpose(1, 2).reshape(2, 8, 16))
    torch.testing.assert_close(attention(x), expected, rtol=1e-5, atol=1e-6)


def test_an_untrained_gpt_knows_nothing():
    model = GPT(GPTConfig(65, 64, 4, 4, 128))
    tokens = torch.randint(65, (12, 65))
    loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(65), abs=0.05)


def test_initialisation_is_nanogpts():
    model = GPT(GPTConfig(65, 64, 4, 4, 128, bias=True))
    assert model.head.weight is model.tokens.weight
    block = model.blocks[2]
    assert block.expand.weight.std().item() == pytest.approx(0.02, rel=0.03)
    for projection in (block.projection, block.attention.projection):
        assert projection.weight.std().item() == pytest.approx(0.02 / math.sqrt(8), rel=0.03)
        assert projection.bias.abs().sum().item() == 0


def test_heads_must_divide_the_width():
    with pytest.raises(InputError, match="n_embd 10 is no multiple of n_head 3; change one of them"):
        GPT(GPTConfig(5, 4, 1, 3, 10))


def test_sampling_repeats_with_its_generator_and_leaves_global_state_and_mode_alone():
    model = GPT(GPTConfig(11, 8, 1, 1, 16, dropout=0.5)).train()
    before = torch.get_rng_state()
    start = torch.zeros(2, 1, dtype=torch.int64)
    first, again = (model.generate(start, 12, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert first.shape == (2, 13)
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
