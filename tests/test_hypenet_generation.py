"""The cache: splitting a sequence into calls in any way changes no logits, and `generate` is the same with it."""

import copy

import pytest
import torch
from compare import assert_matches_reference
from hypenet_models import small_model, tokens
from transformers import DynamicCache

from hypenet import HypeNetCache

# Where the calls end: one token at a time, one long call then steps, long calls, calls as short as a few decode steps.
SPLITS = {
    "tokens": range(1, 31),
    "prompt, then tokens": [21, *range(22, 31)],
    "long pieces": [10, 20, 30],
    "short pieces": [1, 3, 11, 14, 15, 23, 29, 30],
}


def in_pieces(model, ids, ends, mask=None):
    """Return the logits of all tokens, computed with one call per piece."""
    cache, logits, start = None, [], 0
    for end in ends:
        seen = None if mask is None else mask[:, :end]
        outputs = model(ids[:, start:end], attention_mask=seen, past_key_values=cache, use_cache=True)
        cache, start = outputs.past_key_values, end
        logits.append(outputs.logits)
    return torch.cat(logits, dim=1), cache


@pytest.mark.parametrize("scaling", [None, "hype 50", 0.5])
@pytest.mark.parametrize("split", SPLITS)
@torch.no_grad()
def test_pieces_equal_one_call(split, scaling):
    model = small_model(attn_logits_scaling=scaling)
    ids = tokens(2, 30)
    logits, cache = in_pieces(model, ids, SPLITS[split])
    assert_matches_reference("logits", logits, model(ids, use_cache=False).logits)
    assert cache.get_seq_length() == 30
    assert cache.lengths.tolist() == [30, 30]


@pytest.mark.parametrize(
    ("mixers", "fields"),
    [
        (["attn"] * 2, {}),
        (["attn"] * 2, {"attn_use_rope": True, "attn_use_output_gate": False}),
        (["lightning-attn"] * 2, {}),
        (["lightning-attn"] * 2, {"lightning_use_qk_norm": False, "lightning_use_rope": False, "lightning_nkv": 2}),
        (["gdn", "lightning-attn"], {}),
        (["mamba2", "gdn"], {}),
        (["mamba2"] * 2, {"mamba2_nkv": 2, "mamba2_use_qk_norm": False, "mamba2_use_rope": False}),
        (["mamba2"] * 2, {"mamba2_use_gate": False}),
        (["gdn"] * 2, {"gdn_nkv": 1, "gdn_use_gate": False, "gdn_use_rope": False, "gdn_activation": "silu"}),
    ],
)
@torch.no_grad()
def test_pieces_equal_one_call_in_every_form_of_layer(mixers, fields):
    model = small_model(mixers, **fields)
    ids = tokens(2, 30)
    logits, _ = in_pieces(model, ids, SPLITS["short pieces"])
    assert_matches_reference("logits", logits, model(ids, use_cache=False).logits)


@pytest.mark.parametrize("split", SPLITS)
@torch.no_grad()
def test_padded_pieces_equal_each_sequence_alone(split):
    """Padding at the start, the end and between pieces; in some calls a sequence gets no new token."""
    model = small_model(attn_logits_scaling="hype 50")
    ids = tokens(3, 30)
    mask = torch.ones(3, 30, dtype=torch.long)
    mask[0, :13], mask[1, 17:24], mask[2, 2:4], mask[2, 29:] = 0, 0, 0, 0
    logits, cache = in_pieces(model, ids, SPLITS[split], mask)
    for b in range(3):
        real = mask[b].bool()
        alone = model(ids[b, real][None], use_cache=False).logits[0]
        assert_matches_reference(f"sequence {b}", logits[b, real], alone)
        assert logits[b, ~real].abs().max() == 0
    assert cache.lengths.tolist() == mask.sum(1).tolist()


@pytest.mark.parametrize("length", [2, 12])
@torch.no_grad()
def test_unpadded_piece_after_a_padded_prompt(length):
    """The second call has no mask; only the cache knows that the sequences differ in length."""
    model = small_model(attn_logits_scaling="hype 50")
    ids, following = tokens(2, 9), tokens(2, length)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :6] = 0
    cache = model(ids, attention_mask=mask).past_key_values
    logits = model(following, past_key_values=cache).logits
    for b in range(2):
        alone = torch.cat([ids[b, mask[b].bool()], following[b]])[None]
        assert_matches_reference(f"sequence {b}", logits[b], model(alone).logits[0, -length:])


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
@torch.no_grad()
def test_generate_with_and_without_cache(options):
    model = small_model(dtype=torch.float32, attn_logits_scaling="hype 50")
    ids = tokens(2, 9)
    expected = model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False, **options)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False, **options), expected)


@torch.no_grad()
def test_generate_samples_the_same_with_cache():
    model = small_model()
    ids = tokens(2, 9)
    results = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        results.append(model.generate(ids, max_new_tokens=8, do_sample=True, use_cache=use_cache))
    assert torch.equal(*results)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"prefill_chunk_size": 4}], ids=str)
@torch.no_grad()
def test_left_padded_generation_equals_each_prompt_alone(options):
    model = small_model(attn_logits_scaling="hype 50")
    prompts = [tokens(1, n) for n in (3, 14, 8)]
    ids = torch.cat([torch.nn.functional.pad(x, (14 - x.shape[1], 0)) for x in prompts])
    mask = (ids != 0).long()
    alone = [
        model.generate(x, max_new_tokens=8, do_sample=False, num_beams=options.get("num_beams", 1)) for x in prompts
    ]
    together = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, **options)
    for b in range(3):
        assert together[b, 14:].tolist() == alone[b][0, prompts[b].shape[1] :].tolist()


@torch.no_grad()
def test_generate_continues_a_cache():
    model = small_model()
    ids = tokens(1, 9)
    cache = HypeNetCache(model.config)
    first = model.generate(ids, max_new_tokens=4, do_sample=False, past_key_values=cache)
    longer = torch.cat([first, tokens(1, 12)], dim=1)
    result = model.generate(longer, max_new_tokens=4, do_sample=False, past_key_values=cache)
    assert torch.equal(result, model.generate(longer, max_new_tokens=4, do_sample=False, use_cache=False))


@torch.no_grad()
@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_the_cache_has_two_names(name):
    """transformers 5.24 calls models with `cache`, versions before it with `past_key_values`."""
    model, ids = small_model(), tokens(1, 9)
    cache = HypeNetCache(model.config)
    model(ids[:, :6], **{name: cache})
    assert cache.get_seq_length() == 6
    logits = model(ids[:, 6:], **{name: cache}).logits
    assert_matches_reference("logits", logits, model(ids, use_cache=False).logits[:, 6:])
    with pytest.raises(TypeError, match="past_key_values must be a HypeNetCache, got DynamicCache"):
        model(ids, **{name: DynamicCache()})
    with pytest.raises(ValueError, match="cache must be left out with past_key_values"):
        model(ids, past_key_values=cache, cache=HypeNetCache(model.config))


@torch.no_grad()
def test_copies_of_a_prompt_cache_are_independent():
    model = small_model()
    prompt, endings = tokens(1, 9), [tokens(1, 3), tokens(1, 12)]
    cache = model(prompt).past_key_values
    for ending in endings:
        logits = model(ending, past_key_values=copy.deepcopy(cache)).logits
        whole = model(torch.cat([prompt, ending], dim=1), use_cache=False).logits
        assert_matches_reference("logits", logits, whole[:, 9:])


@torch.no_grad()
def test_recurrent_state_is_present_after_the_prompt():
    """A layer without a convolution state must not restart decoding from a zero state."""
    model = small_model()
    cache = model(tokens(2, 9)).past_key_values
    for i in model.config.recurrent_layers:
        assert cache.has_previous_state(i)
        assert cache.get_recurrent_state(i).abs().max() > 0
    ids = tokens(2, 1)
    before = model(ids, past_key_values=cache).logits
    cache.reset()
    assert not cache.has_previous_state(1) and cache.get_seq_length() == 0
    assert not torch.allclose(model(ids, past_key_values=cache).logits, before)


@torch.no_grad()
def test_buffers_stay_where_they_are_while_decoding():
    model = small_model()
    cache = HypeNetCache(model.config, capacity=40)

    def addresses():
        kept = []
        for i, layer in enumerate(cache.layers):
            kept += [layer.keys, layer.values] if i in model.config.softmax_layers else [layer.state]
        return [x.data_ptr() for x in [*kept, cache.lengths]]

    model(tokens(2, 9), past_key_values=cache)
    before = addresses()
    for _ in range(31):
        model(tokens(2, 1), past_key_values=cache)
    assert addresses() == before
    assert cache.layers[0].keys.shape == (2, 40, 2, 16)
    model(tokens(2, 1), past_key_values=cache)
    assert cache.layers[0].keys.shape == (2, 256, 2, 16)


@torch.no_grad()
def test_padding_is_not_stored():
    model = small_model()
    mask = torch.zeros(2, 300, dtype=torch.long)
    mask[0, -70:], mask[1, -5:] = 1, 1
    cache = model(tokens(2, 300), attention_mask=mask).past_key_values
    assert cache.layers[0].keys.shape[1] == 70
    assert cache.get_seq_length() == 300
    assert cache.lengths.tolist() == [70, 5]


@torch.no_grad()
def test_cache_size():
    model = small_model(dtype=torch.float32)
    cache = HypeNetCache(model.config, capacity=100)
    model(tokens(1, 100), past_key_values=cache)
    expected = 100 * model.config.cache_bytes_per_token(torch.float32) + model.config.state_bytes()
    assert cache.nbytes() == expected + cache.lengths.nbytes


@torch.no_grad()
def test_sequences_are_selected_and_repeated():
    model = small_model()
    ids = tokens(3, 12)
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[1, :5] = 0
    for change, order in (
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 1])), [2, 0, 1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ):
        cache = model(ids, attention_mask=mask).past_key_values
        change(cache)
        following = tokens(1, 1)
        logits = model(following.expand(len(order), 1), past_key_values=cache).logits
        for row, b in enumerate(order):
            whole = torch.cat([ids[b, mask[b].bool()][None], following], dim=1)
            assert_matches_reference(f"row {row}", logits[row, -1], model(whole).logits[0, -1])


def test_continuing_a_cache_carries_no_gradient():
    model = small_model().train()
    assert model(tokens(1, 9)).past_key_values is None
    ids = tokens(1, 21)
    cache = model(ids[:, :9], use_cache=True).past_key_values
    hidden = model.model(ids[:, 9:], past_key_values=cache).last_hidden_state
    assert not hidden.requires_grad
    assert_matches_reference("hidden", hidden, model.model(ids).last_hidden_state[:, 9:])


def test_checkpointed_training_makes_no_cache():
    model = small_model().train()
    model.activation_checkpointing_enable()
    cache = HypeNetCache(model.config)
    outputs = model(tokens(1, 9), use_cache=True, past_key_values=cache)
    assert outputs.past_key_values is None and cache.get_seq_length() == 0


def test_refusals():
    model = small_model()
    ids = tokens(2, 5)
    with pytest.raises(TypeError, match="past_key_values must be a HypeNetCache, got DynamicCache"):
        model(ids, past_key_values=DynamicCache())
    cache = model(ids).past_key_values
    with pytest.raises(ValueError, match="the 2 sequences that the cache holds, got 1"):
        model(ids[:1], past_key_values=cache)
    with pytest.raises(ValueError, match="cache_implementation must be None, got 'static'"):
        model.generate(ids, max_new_tokens=2, cache_implementation="static")
    fixed = HypeNetCache(model.config, capacity=6, fixed=True)
    model(ids, past_key_values=fixed)
    with pytest.raises(ValueError, match=r"capacity must hold 5 \+ 2 tokens \(fixed=True\), got 6"):
        model(ids[:, :2], past_key_values=fixed)
    with pytest.raises(NotImplementedError, match="HypeNetForCausalLM: continuous batching must be off"):
        model.generate_batch([[3, 4]])
