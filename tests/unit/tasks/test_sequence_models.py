"""The transformer and the GRU of characters are torch's, written so that copies of them can be run at once."""

import pytest
import torch
from torch import nn

from trimtab.tasks.sequence_models import CharGRU, CharTransformer

INPUTS = torch.randint(7, (9, 6), generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize("widths", [(5,), (5, 5), (4, 6)])
def test_the_gru_is_torchs(widths):
    mine = CharGRU(7, widths).double()
    x = mine.tokens(INPUTS.long())
    for place, width in enumerate(widths):
        theirs = nn.GRU(x.shape[-1], width, batch_first=True).double()
        with torch.no_grad():
            for name, linear in (("ih", mine.from_input[place]), ("hh", mine.from_state[place])):
                getattr(theirs, f"weight_{name}_l0").copy_(linear.weight)
                getattr(theirs, f"bias_{name}_l0").copy_(linear.bias)
        x, _ = theirs(x)
    torch.testing.assert_close(mine(INPUTS), mine.readout(x[:, -1]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("n_blocks", "heads"), [(1, 1), (1, 2), (2, 1), (3, 4)])
def test_the_transformer_is_torchs_with_a_causal_mask(n_blocks, heads):
    mine = CharTransformer(7, 6, 8, n_blocks, heads, nn.GELU).double()
    mask = nn.Transformer.generate_square_subsequent_mask(6).double()
    x = mine.tokens(INPUTS.long()) + mine.positions.weight
    for block in mine.blocks:
        theirs = nn.TransformerEncoderLayer(8, heads, 16, 0.0, nn.functional.gelu, batch_first=True, norm_first=True)
        theirs = theirs.double()
        with torch.no_grad():
            theirs.self_attn.in_proj_weight.copy_(torch.cat([block.query.weight, block.key_value.weight]))
            theirs.self_attn.in_proj_bias.copy_(torch.cat([block.query.bias, torch.zeros(16)]))
            for name in ("norm1", "norm2"):
                getattr(theirs, name).load_state_dict(getattr(block, name).state_dict())
            theirs.self_attn.out_proj.load_state_dict(block.out.state_dict())
            theirs.linear1.load_state_dict(block.mlp[0].state_dict())
            theirs.linear2.load_state_dict(block.mlp[2].state_dict())
        x = theirs(x, src_mask=mask)
    torch.testing.assert_close(mine(INPUTS), mine.readout(mine.norm(x[:, -1])), rtol=1e-10, atol=1e-10)
