"""A prompt that is read in pieces inside one call, and a cache that is saved: nothing differs from one whole call."""

import pytest
import torch
from compare import assert_matches_reference
from hypenet_models import small_model, tokens
from safetensors.torch import load_file, save_file

from hypenet import HypeNetCache, load_cache, save_cache


@pytest.mark.parametrize("chunk", [1, 7, 64, 100])
@torch.no_grad()
def test_pieces_inside_one_call(chunk):
    model = small_model(attn_logits_scaling="hype 50")
    ids = tokens(3, 70)
    mask = torch.ones_like(ids)
    mask[0, :33], mask[2, 40:50] = 0, 0
    for given in ({}, {"attention_mask": mask}):
        expected = model(ids, **given)
        for keep in (0, 1, 9, torch.tensor([3, 69])):
            result = model(ids, prefill_chunk=chunk, logits_to_keep=keep, **given)
            right = expected.logits[:, -keep:] if isinstance(keep, int) else expected.logits[:, keep]
            assert_matches_reference(f"{keep} logits", result.logits, right)
        assert torch.equal(result.past_key_values.lengths, expected.past_key_values.lengths)
        following = tokens(3, 1)
        logits = [model(following, past_key_values=x.past_key_values).logits for x in (result, expected)]
        assert_matches_reference("the next token", *logits)


@torch.no_grad()
def test_pieces_continue_a_cache():
    model = small_model()
    ids = tokens(2, 60)
    mask = torch.ones_like(ids)
    mask[1, 25:38] = 0
    expected = model(ids, attention_mask=mask).logits[:, 20:]
    for given in (mask, mask[:, 20:]):  # a mask may cover the tokens in the cache or not
        cache = model(ids[:, :20]).past_key_values
        embedded = model.get_input_embeddings()(ids[:, 20:])
        result = model(
            inputs_embeds=embedded, attention_mask=given, past_key_values=cache, prefill_chunk=11, logits_to_keep=0
        )
        assert_matches_reference("logits", result.logits, expected)


def test_memory_does_not_grow_with_the_prompt(monkeypatch):
    """No layer ever sees more than a piece, and the head sees what is kept."""
    model = small_model(dtype=torch.float32)
    sizes, rows = [], []
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: sizes.append(args[0].shape[1]))
    model.lm_head.register_forward_hook(lambda module, args, output: rows.append(args[0].shape[1]))
    with torch.no_grad():
        model(tokens(1, 1000), prefill_chunk=128, logits_to_keep=1)
    assert max(sizes) == 128 and len(sizes) == 8 and rows == [1]


def test_refused_pieces():
    model, ids = small_model(), tokens(1, 6)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    for given, message in (
        ({"prefill_chunk": 0}, "prefill_chunk must be at least 1, got 0"),
        ({"labels": ids}, "prefill_chunk must come without labels"),
        ({"use_cache": False}, "prefill_chunk must come with a cache"),
        ({"output_hidden_states": True}, "prefill_chunk must come without output_hidden_states"),
        ({"cu_seqlens": torch.tensor([0, 6])}, "prefill_chunk must come without cu_seqlens"),
        ({"position_ids": positions}, "prefill_chunk must come with one document in every row, got several"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 2, 2, 2]])}, "prefill_chunk must come with one document in every"),
        ({"attention_mask": torch.ones(1, 4)}, r"attention_mask must have shape \[1, 6\]"),
        ({"inputs_embeds": torch.zeros(1, 6, 48)}, "exactly one of input_ids and inputs_embeds must be given"),
    ):
        with pytest.raises(ValueError, match=message):
            model(ids, **({"prefill_chunk": 3} | given))
    with pytest.raises(ValueError, match="in evaluation mode"):
        model.train()(ids, prefill_chunk=3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@torch.no_grad()
def test_saved_caches_continue(dtype, tmp_path):
    model = small_model(dtype=dtype, attn_logits_scaling="hype 50")
    ids = tokens(2, 150)
    mask = torch.ones_like(ids)
    mask[1, :30] = 0
    for given in ({}, {"attention_mask": mask}):
        cache = HypeNetCache(model.config, capacity=400, snapshot_every=64)
        model(ids, past_key_values=cache, **given)
        save_cache(cache, tmp_path / "cache", model, ids)
        loaded, seen = load_cache(tmp_path / "cache", model)
        assert torch.equal(seen, ids) and loaded.snapshot_every == 64
        assert [loaded.longest_prefix(n) for n in (149, 100)] == [cache.longest_prefix(n) for n in (149, 100)]
        following = tokens(2, 20)
        for part in (following[:, :1], following[:, 1:]):
            logits = [model(part, past_key_values=x).logits for x in (loaded, cache)]
            assert torch.equal(*logits)
    assert list(tmp_path.iterdir()) == [tmp_path / "cache"]
    assert load_cache(tmp_path / "cache", model.model)[1] is not None


@torch.no_grad()
def test_refused_files(tmp_path):
    model, path = small_model(), tmp_path / "cache"
    ids = tokens(1, 9)
    with pytest.raises(ValueError, match="save_cache: cache must have seen at least one token"):
        save_cache(HypeNetCache(model.config), path, model)
    cache = model(ids).past_key_values
    with pytest.raises(ValueError, match=r"input_ids must have shape \[1, T\], got \[2, 9\]"):
        save_cache(cache, path, model, ids.expand(2, -1))
    save_cache(cache, path, model)
    assert load_cache(path, model)[1] is None
    other = small_model()
    rescaled = small_model(attn_logits_scaling=0.5)
    rescaled.load_state_dict(model.state_dict())
    for wrong in (other, rescaled, small_model(dtype=torch.float32)):
        with pytest.raises(ValueError, match="the cache of a model with these weights and dtype"):
            load_cache(path, wrong)
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(ValueError, match="path must be a complete file of save_cache"):
        load_cache(path, model)
    path.write_bytes(content)
    save_file({"x": torch.zeros(1)}, tmp_path / "weights")
    with pytest.raises(ValueError, match=r"path must be a file of save_cache \('hypenet cache 1'\), got .* \(None\)"):
        load_cache(tmp_path / "weights", model)
    with pytest.raises(FileNotFoundError):
        load_cache(tmp_path / "none", model)
    with pytest.raises(OSError):
        save_cache(cache, tmp_path / "no folder" / "cache", model)

    tensors = load_file(path)
    for name, damaged in (
        ("counts", tensors["counts"][:3]),
        ("1.state", tensors["1.state"][:, :1]),
        ("0.keys", tensors["0.keys"][:, :3]),
        ("lengths", tensors["lengths"] + 1),
        ("4.values", None),
    ):
        changed = {key: x for key, x in (tensors | {name: damaged}).items() if x is not None}
        with pytest.raises((ValueError, KeyError)):
            HypeNetCache(model.config).load_state_dict(changed)
