"""A captured decode step gives what calls of the model give."""

import pytest
import torch
from hypenet_models import small_model, tokens

from hypenet import DecodeGraph, HypeNetCache


class PlayedGraph(DecodeGraph):
    """Runs the step again where the GPU would replay it."""

    def _capture(self, step):
        logits = step()
        return logits, lambda: logits.copy_(step())


def prompted(model, count, length, **options):
    """Return caches that have seen the same prompt, of which one sequence has padding."""
    device = model.device
    ids, mask = tokens(2, length).to(device), torch.ones(2, length, dtype=torch.long, device=device)
    mask[0, :4] = 0
    caches = [HypeNetCache(model.config, **options) for _ in range(count)]
    for cache in caches:
        model(ids, attention_mask=mask, past_key_values=cache)
    return caches


def assert_replays_equal_calls(model, graph_class, length, capacity):
    caches = prompted(model, 2, length, capacity=capacity, fixed=True)
    step = graph_class(model, caches[1])
    assert caches[1].get_seq_length() == length
    for _ in range(capacity - length):
        token = tokens(2, 1).to(model.device)
        assert torch.equal(step(token), model(token, past_key_values=caches[0]).logits)
        assert torch.equal(caches[1].lengths, caches[0].lengths)
        assert caches[1].get_seq_length() == caches[0].get_seq_length()
    with pytest.raises(ValueError, match=rf"capacity must hold {capacity} \+ 1 tokens"):
        step(token)
    with pytest.raises(ValueError, match=r"input_ids must have shape \[2, 1\], got \[2, 2\]"):
        step(tokens(2, 2))


@torch.no_grad()
def test_replays_equal_calls():
    assert_replays_equal_calls(small_model(attn_logits_scaling="hype 50"), PlayedGraph, 9, 20)


@pytest.mark.cuda
@torch.no_grad()
def test_replays_on_a_gpu_equal_calls():
    model = small_model(dtype=torch.bfloat16, head_dim=64, attn_logits_scaling="hype 50").cuda()
    assert_replays_equal_calls(model, DecodeGraph, 40, 80)


@torch.no_grad()
def test_refusals():
    model = small_model()
    growing, full, past = (
        *prompted(model, 1, 9),
        *prompted(model, 1, 9, capacity=20, fixed=True),
        *prompted(model, 1, 9, capacity=20, fixed=True, snapshot_every=64),
    )
    for cache in (growing, past, HypeNetCache(model.config, capacity=20, fixed=True)):
        with pytest.raises(ValueError, match="cache must have a fixed capacity, have seen a prompt"):
            DecodeGraph(model, cache)
    with pytest.raises(ValueError, match="model must be on a CUDA device, got cpu"):
        DecodeGraph(model, full)
