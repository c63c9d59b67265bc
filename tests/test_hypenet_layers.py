"""The layers for networks of one's own: those of a HypeNet, whole or in parts, with and without a cache."""

import pytest
import torch
from torch.testing import assert_close

from hypenet import HypeNetCache, HypeNetForCausalLM
from hypenet.layers import GatedDeltaLayer, HypeAttentionLayer, LightningLayer, Mamba2Layer

LAYERS = {
    "lightning": lambda **options: LightningLayer(48, 4, 2, 16, **options),
    "gated delta": lambda **options: GatedDeltaLayer(48, 4, 2, 16, **options),
    "mamba2": lambda **options: Mamba2Layer(48, 4, 2, 16, **options),
    "attention": lambda **options: HypeAttentionLayer(48, 4, 2, 16, logit_scale_base=50.0, **options),
    "attention with positions": lambda **options: HypeAttentionLayer(48, 4, 2, 16, use_rope=True, **options),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    return LAYERS[request.param]().double().eval()


@torch.no_grad()
def test_a_sequence_in_parts_is_the_whole(layer):
    """A prompt, a long piece, a few tokens and single ones, with the cache in between."""
    x = torch.randn(2, 60, 48, dtype=torch.float64)
    whole, nothing = layer(x)
    assert nothing is None
    cache, parts = None, []
    for piece in x.split([20, 31, 5, 1, 1, 2], dim=1):
        y, cache = layer(piece, cache, use_cache=True)
        parts.append(y)
    assert cache.get_seq_length() == 60
    assert_close(torch.cat(parts, dim=1), whole)


@torch.no_grad()
def test_padding_changes_nothing(layer):
    """In a prompt, and in the steps after it."""
    x, mask = torch.randn(2, 30, 48, dtype=torch.float64), torch.ones(2, 30, dtype=torch.long)
    mask[0, :11] = 0
    prompt, cache = layer(x[:, :28], use_cache=True, attention_mask=mask[:, :28])
    steps = [layer(x[:, i : i + 1], cache, attention_mask=mask[:, i : i + 1])[0] for i in (28, 29)]
    y = torch.cat([prompt, *steps], dim=1)
    assert (y[0, :11] == 0).all()
    for b in range(2):
        real = mask[b].bool()
        assert_close(y[b, real], layer(x[b, real][None])[0][0])


@torch.no_grad()
def test_packed_sequences_are_those_alone(layer):
    x = torch.randn(1, 50, 48, dtype=torch.float64)
    packed, _ = layer(x, cu_seqlens=torch.tensor([0, 13, 50], dtype=torch.int32))
    assert_close(packed, torch.cat([layer(x[:, :13])[0], layer(x[:, 13:])[0]], dim=1))


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_a_layer_is_that_of_a_model_of_its_configuration(name):
    layer = LAYERS[name]().double().eval()
    model = HypeNetForCausalLM(layer.config).double().eval().model
    model.layers[0].self_attn.load_state_dict(layer.mixer.state_dict())
    seen = []
    model.layers[0].self_attn.register_forward_hook(lambda module, args, y: seen.append((args[0], y)))
    model(torch.arange(1, 40)[None])
    [(x, y)] = seen
    assert_close(layer(x)[0], y)


def test_every_parameter_learns(layer):
    x = torch.randn(2, 33, 48, dtype=torch.float64, requires_grad=True)
    layer(x)[0].square().sum().backward()
    assert x.grad.abs().max() > 0
    unused = [name for name, p in layer.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert unused == []


def test_a_continued_cache_computes_no_gradients(layer):
    x = torch.randn(1, 12, 48, dtype=torch.float64)
    _, cache = layer(x, use_cache=True)
    assert not layer(x, cache)[0].requires_grad


def test_default_sizes():
    layer = HypeAttentionLayer(64, 4)
    assert (layer.mixer.num_heads, layer.mixer.num_kv_heads, layer.mixer.head_dim) == (4, 4, 16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LightningLayer(50, 4), "LightningLayer: hidden_size must be a multiple of num_heads without head_dim"),
        (lambda: GatedDeltaLayer(48, 4, 3, 16), "gdn_nh must be a multiple of gdn_nkv|num_attention_heads must be a"),
        (lambda: HypeAttentionLayer(48, 4, logit_scale_base=1.0), "attn_logits_scaling must be None, a finite number"),
        (
            lambda: LightningLayer(64, 4)(torch.randn(3, 64)),
            r"hidden_states must have shape \[B, T, 64\], got \[3, 64\]",
        ),
        (
            lambda: LightningLayer(64, 4)(torch.randn(1, 3, 64), use_cache=True, cu_seqlens=torch.tensor([0, 3])),
            "LightningLayer: cu_seqlens must come without a cache and without attention_mask",
        ),
        (
            lambda: LightningLayer(64, 4)(torch.randn(2, 3, 64), cu_seqlens=torch.tensor([0, 3])),
            "input_ids must have a batch of 1 with cu_seqlens, got 2",
        ),
    ],
)
def test_arguments_that_cannot_be(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_caches_that_are_none_or_of_another_batch():
    layer = LightningLayer(64, 4)
    with pytest.raises(TypeError, match="LightningLayer: cache must be a HypeNetCache, got list"):
        layer(torch.randn(1, 3, 64), [])
    _, cache = layer(torch.randn(1, 3, 64), use_cache=True)
    assert isinstance(cache, HypeNetCache)
    with pytest.raises(ValueError, match="must have the 1 sequences that the cache holds, got 2"):
        layer(torch.randn(2, 3, 64), cache)
