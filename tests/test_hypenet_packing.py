"""Packed documents and masks, without compiling: each form has the results of every document alone, or is refused."""

import pytest
import torch
from compare import assert_matches_reference
from hypenet_models import small_model, tokens
from transformers import AutoModel

from hypenet import HypeNetCache
from hypenet.packing import Packing, find_documents, packed_positions

# Lengths of the documents in each row, with the padding behind, between or before them as length below 0.
ROWS = {
    "one row": [[4, 1, 7]],
    "rows": [[4, 1, 7], [12], [5, 7]],
    "padding behind": [[4, 1, -7], [12], [5, 5, -2]],
    "padding before": [[-3, 4, 5], [-11, 1], [12]],
    "padding between": [[4, -2, 6], [-1, 5, -3, 2, -1], [6, 6]],
    "an empty row": [[5, 7], [-12], [-6, 6]],
}


def packed(rows):
    """Return ids, positions and document numbers [B, 12], the latter two 0 at padding, and where each document is."""
    ids, positions, numbers = (
        tokens(len(rows), 12),
        torch.zeros(len(rows), 12).long(),
        torch.zeros(len(rows), 12).long(),
    )
    places = []
    for b, lengths in enumerate(rows):
        start, number = 0, 0
        for length in lengths:
            if length > 0:
                number += 1
                place = slice(start, start + length)
                positions[b, place], numbers[b, place] = torch.arange(length), number
                places.append((b, place))
            start += abs(length)
    return ids, positions, numbers, places


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("form", ["positions", "positions and mask", "numbers", "numbers and positions"])
@torch.no_grad()
def test_every_document_is_alone(rows, form):
    model = small_model(attn_logits_scaling="hype 50")
    ids, positions, numbers, places = packed(ROWS[rows])
    given = {}
    if "positions" in form:
        given["position_ids"] = positions
    if form == "positions":
        numbers.fill_(1)
        places = [(b, place) for b, place in places if "padding" not in rows and "empty" not in rows]
    else:
        given["attention_mask"] = numbers if "numbers" in form else (numbers > 0).long()
    logits = model(ids, **given).logits
    for b, place in places:
        alone = model(ids[b, place][None]).logits[0]
        assert_matches_reference(f"row {b}, tokens {place.start} to {place.stop}", logits[b, place], alone)
    assert (logits[numbers == 0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_mask_of_ones_changes_nothing(dtype):
    model = small_model()
    ids, positions, _, _ = packed(ROWS["rows"])
    ones = torch.ones_like(ids, dtype=dtype)
    assert torch.equal(model(ids, attention_mask=ones).logits, model(ids).logits)
    expected = model(ids, position_ids=positions).logits
    assert torch.equal(model(ids, attention_mask=ones, position_ids=positions).logits, expected)


@torch.no_grad()
def test_positions_that_go_on_are_one_document():
    """Positions that count the real tokens, as `generate` gives them, or all of them, from any first position."""
    model = small_model()
    ids = tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :3], mask[1, 4:6] = 0, 0
    expected = model(ids, attention_mask=mask).logits
    counted = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    assert torch.equal(model(ids, attention_mask=mask, position_ids=counted).logits, expected)
    for positions in (counted, counted + 7, torch.arange(12).expand(2, 12)):
        assert find_documents(mask.bool(), positions, None) is None
    assert find_documents(None, torch.arange(5, 17).expand(2, 12), torch.full((2, 12), 255)) is None


def test_no_documents_in_a_cache():
    model = small_model()
    ids, positions, numbers, _ = packed(ROWS["rows"])
    for given in ({"use_cache": True}, {"past_key_values": HypeNetCache(model.config)}):
        with pytest.raises(ValueError, match="position_ids must have one document in every row with a cache"):
            model(ids, position_ids=positions, **given)
        with pytest.raises(ValueError, match="attention_mask must have one document in every row with a cache"):
            model(ids, attention_mask=numbers, **given)
    with pytest.raises(ValueError, match="attention_mask must have one document in every row with a cache"):
        model.generate(ids, attention_mask=numbers, max_new_tokens=2)
    cache = model(ids).past_key_values
    following = torch.full((3, 20), 2)
    with pytest.raises(ValueError, match="attention_mask must have one document in every row with a cache"):
        model(tokens(3, 8), attention_mask=following, past_key_values=cache)
    assert model(ids, position_ids=positions).past_key_values is None


def test_masks_with_another_meaning():
    model = small_model()
    ids = tokens(2, 6)
    added = torch.zeros(2, 6)
    with pytest.raises(ValueError, match="got floating-point zeros only, as of a mask that is added to logits"):
        model(ids, attention_mask=added)
    for value in (-1.0, torch.finfo(torch.float32).min, -torch.inf, torch.nan):
        added[0, :2] = value
        with pytest.raises(ValueError, match="got negative numbers, as of a mask that is added to logits"):
            model(ids, attention_mask=added)
    with pytest.raises(ValueError, match="got negative numbers"):
        model(ids, attention_mask=-torch.ones_like(ids))
    with pytest.raises(ValueError, match="1 for real tokens and 0 for padding, got fractions"):
        model(ids, attention_mask=torch.full((2, 6), 0.5))
    with pytest.raises(ValueError, match=r"attention_mask must have shape \[2, 6\] .* got \[2, 1, 6, 6\]"):
        model(ids, attention_mask=torch.zeros(2, 1, 6, 6))
    with pytest.raises(ValueError, match=r"position_ids must have shape \[2, 6\], got \[2, 7\]"):
        model(ids, position_ids=torch.zeros(2, 7).long())


@pytest.mark.parametrize("make", [Packing.of_rows, Packing.of_rows_and_padding])
def test_packing_and_back(make):
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 1, 1]]).bool()
    x = torch.randn(3, 4, 2)
    packing = make(mask)
    row = packing.pack(x)
    assert torch.equal(row[0, :5], x[mask])
    assert packing.cu_seqlens.tolist() == [0, 2, 2, 5]
    assert packing.order[:5].tolist() == [0, 1, 0, 1, 2]
    assert packing.counts.tolist() == [2, 0, 3]
    assert torch.equal(packing.unpack(row), x * mask[..., None])


@torch.no_grad()
def test_boundaries_may_be_of_empty_documents_and_end_before_the_tokens():
    model = small_model(attn_logits_scaling="hype 50")
    ids = tokens(1, 12)
    bounds = torch.tensor([0, 0, 4, 4, 4, 9, 9], dtype=torch.int32)
    assert packed_positions(bounds, 12).tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1, 2]]
    logits = model(ids, cu_seqlens=bounds).logits
    for place in (slice(0, 4), slice(4, 9)):
        assert_matches_reference("logits", logits[:, place], model(ids[:, place]).logits)
    assert logits.isfinite().all()


@torch.no_grad()
def test_the_backbone_alone(tmp_path):
    small_model(dtype=torch.float32).save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path)
    ids, positions, numbers, _ = packed(ROWS["padding between"])
    hidden = [
        model(ids, attention_mask=mask, position_ids=positions).last_hidden_state for mask in (numbers, numbers > 0)
    ]
    assert torch.equal(*hidden)
