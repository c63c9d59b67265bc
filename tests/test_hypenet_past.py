"""Going back: a cache that was cropped, or forked at a prefix, continues like one that never saw the rest."""

import pytest
import torch
from compare import assert_matches_reference
from hypenet_models import MIXED, small_model, tokens

from hypenet import HypeNetCache
from hypenet.cache_layers import RECORDED_TOKENS

KINDS = {
    "mixed": MIXED,
    "attn": ["attn"] * 2,
    "lightning-attn": ["lightning-attn"],
    "gdn": ["gdn"],
    "mamba2": ["mamba2"],
}


def recording(model, **options):
    cache = HypeNetCache(model.config, **options)
    cache.activate_past_recording()
    return cache


def feed(model, cache, ids, pieces):
    """Run the tokens in calls of these lengths, the last one again and again."""
    start, pieces = 0, list(pieces)
    while start < ids.shape[1]:
        length = pieces.pop(0) if len(pieces) > 1 else pieces[0]
        model(ids[:, start : start + length], past_key_values=cache)
        start += length


def assert_continues(model, cache, seen, name):
    """Check the logits of further tokens, in a long call and in steps, against those of one call."""
    following = tokens(seen.shape[0], 12)
    whole = model(torch.cat([seen, following], dim=1), use_cache=False).logits[:, seen.shape[1] :]
    logits = [model(following[:, :9], past_key_values=cache).logits]
    logits += [model(following[:, i : i + 1], past_key_values=cache).logits for i in range(9, 12)]
    assert_matches_reference(name, torch.cat(logits, dim=1), whole)


# A prompt then steps, drafts, long calls, single tokens from the start; together more than twice what is recorded.
CALLS = {"steps": [180, 1], "drafts": [70, 5], "long": [20, 64, 65, 31], "tokens": [1]}


@pytest.mark.parametrize(("kinds", "calls"), [("mixed", x) for x in CALLS] + [(x, "drafts") for x in KINDS])
@torch.no_grad()
def test_the_last_tokens_can_be_removed(kinds, calls):
    model = small_model(KINDS[kinds], attn_logits_scaling="hype 50")
    ids = tokens(2, 200)
    for removed in (3, RECORDED_TOKENS):
        cache = recording(model)
        feed(model, cache, ids, CALLS[calls])
        assert cache.longest_prefix(200 - removed) == 200 - removed
        cache.crop(-removed)
        assert (cache.get_seq_length(), cache.lengths.tolist()) == (200 - removed, [200 - removed] * 2)
        assert_continues(model, cache, ids[:, : 200 - removed], f"{removed} removed")


@torch.no_grad()
def test_tokens_are_removed_again_and_again():
    """As by assisted generation: every call is a draft of which some tokens are taken back."""
    model = small_model()
    ids = tokens(1, 160)
    cache = recording(model)
    generator = torch.Generator().manual_seed(0)
    kept = 0
    while kept < 160:
        length, accepted = torch.randint(1, 14, (2,), generator=generator).tolist()
        draft = ids[:, kept : kept + length].clone()
        draft[:, accepted:] = tokens(1, 1)
        model(draft, past_key_values=cache)
        removed = max(draft.shape[1] - accepted, 0)
        cache.crop(-removed)
        kept += draft.shape[1] - removed
        assert cache.get_seq_length() == kept
    assert_continues(model, cache, ids, "after many drafts")


@pytest.mark.parametrize("kinds", KINDS)
@torch.no_grad()
def test_snapshots(kinds):
    """Within one call exactly every 64 tokens; in shorter calls at their ends; and where one is asked for."""
    model = small_model(KINDS[kinds])
    ids = tokens(2, 300)
    cache = HypeNetCache(model.config, snapshot_every=64)
    feed(model, cache, ids, [150, 10, 40, 5])
    recurrent = [layer for layer in cache.layers if hasattr(layer, "snapshots")]
    for layer in recurrent:
        assert sorted(layer.snapshots) == [64, 128, 200, 265]
    for kept in (265, 200, 64):
        assert cache.longest_prefix(kept) == kept
        if recurrent:
            assert cache.longest_prefix(kept + 3) == kept
            with pytest.raises(ValueError, match=f"the states after {kept + 3} tokens are stored; nearest: {kept} "):
                cache.crop(kept + 3)
        cache.crop(kept)
        assert_continues(model, cache, ids[:, :kept], f"{kept} kept")
        cache.crop(kept)
    assert cache.longest_prefix(63) == (0 if recurrent else 63)
    cache.crop(-64)
    assert cache.get_seq_length() == 0 and not any(layer.snapshots for layer in recurrent)
    feed(model, cache, ids, [20])
    assert_continues(model, cache, ids, "from the start")


@pytest.mark.parametrize("record", [False, True])
@torch.no_grad()
def test_forks_are_independent(record):
    model = small_model()
    ids = tokens(2, 100)
    cache = HypeNetCache(model.config)
    if record:
        cache.activate_past_recording()
    feed(model, cache, ids[:, :80], [80])
    cache.snapshot()
    feed(model, cache, ids[:, 80:], [20])
    for kept in (80, None, 90, 0):
        if kept == 90 and not record:
            with pytest.raises(ValueError, match="the states after 90 tokens are stored; nearest: 80 "):
                cache.fork(kept)
            continue
        fork = cache.fork(kept)
        assert_continues(model, fork, ids[:, :kept], f"fork of {kept}")
    assert cache.get_seq_length() == 100
    assert_continues(model, cache, ids, "the original")


@torch.no_grad()
def test_padding_is_no_past():
    """After a padded call every sequence has another length: one can go back to its end and no further."""
    model = small_model()
    ids = tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    cache = recording(model)
    model(ids, attention_mask=mask, past_key_values=cache)
    cache.snapshot()
    steps = tokens(2, 6)
    model(steps[:, :4], past_key_values=cache)
    model(steps[:, 4:], past_key_values=cache)
    assert cache.longest_prefix(39) == 0 and cache.longest_prefix(43) == 43
    with pytest.raises(
        ValueError, match="tokens_to_remove must be such that the 40 positions with padding remain, got -7"
    ):
        cache.crop(-7)
    for removed in (3, 3):
        cache.crop(-removed)
        kept = cache.get_seq_length()
        following = tokens(2, 1)
        logits = model(following, past_key_values=cache).logits
        cache.crop(kept)
        for b in range(2):
            alone = torch.cat([ids[b, mask[b].bool()], steps[b, : kept - 40], following[b]])[None]
            assert_matches_reference(f"sequence {b}, {kept}", logits[b, -1], model(alone).logits[0, -1])
    model(tokens(2, 1), attention_mask=torch.tensor([[1], [0]]), past_key_values=cache)
    assert cache.longest_prefix(40) == 0 and cache.longest_prefix(41) == 41


@torch.no_grad()
def test_beams_take_their_past_along():
    model = small_model()
    ids = tokens(3, 90)
    cache = recording(model, snapshot_every=64)
    feed(model, cache, ids, [70, 1])
    cache.batch_select_indices(torch.tensor([2, 0]))
    following = tokens(2, 5)
    model(following, past_key_values=cache)
    for kept in (92, 64):
        cache.crop(kept)
        assert_continues(model, cache, torch.cat([ids[[2, 0]], following], dim=1)[:, :kept], f"{kept} kept")
        cache.crop(kept)


def test_recording_needs_no_inference_mode():
    """Where gradients are wanted the states on the way are computed apart; the gradients are the same."""
    model = small_model(MIXED)
    ids = tokens(1, 150)
    cache = recording(model, snapshot_every=64)

    def gradients(logits):
        return torch.autograd.grad(logits, [model.lm_head.weight, model.model.embed_tokens.weight], logits.cos())

    results = gradients(model(ids, past_key_values=cache).logits), gradients(model(ids).logits)
    for got, expected in zip(*results, strict=True):
        assert_matches_reference("gradient", got, expected)
    assert sorted(cache.layers[1].snapshots) == [64, 128]
    cache.crop(-10)
    with torch.no_grad():
        assert_continues(model, cache, ids[:, :140], "after training")


def test_refusals():
    model = small_model()
    with pytest.raises(ValueError, match="snapshot_every must be a multiple of 64, or 0, got 100"):
        HypeNetCache(model.config, snapshot_every=100)
    with pytest.raises(ValueError, match="capacity must be positive with fixed=True, got 0"):
        HypeNetCache(model.config, fixed=True)
    cache = HypeNetCache(model.config)
    cache.crop(-3)  # nothing is there
    model(tokens(1, 5), past_key_values=cache)
    cache.crop(0)
    cache.crop(25)
    assert not cache.is_croppable
    with pytest.raises(ValueError, match="must be at most the 5 tokens seen, got -6"):
        cache.crop(-6)
    with pytest.raises(ValueError, match="fork: length must be at most the 5 tokens seen, got 6"):
        cache.fork(6)
    with pytest.raises(ValueError, match="the states after 4 tokens are stored; nearest: 0 "):
        cache.crop(-1)
    cache.activate_past_recording()
    assert cache.is_croppable
