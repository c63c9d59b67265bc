"""A compiled or exported model computes what the model does: padding, packed documents, caches; or it says why not."""

import pytest
import torch
from hypenet_models import VOCABULARY, small_model, tokens
from patched_models import fresh_dynamo  # noqa: F401, a fixture
from test_hypenet_model import pad
from torch.testing import assert_close
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

KINDS = ["attn", "lightning-attn", "gdn", "mamba2"]
POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 0, 1]])

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def compiled(model, **options):
    return torch.compile(model, backend="eager", **options)


def batches():
    """Return ids and masks: padding on each side, none, and rows that are nothing but padding."""
    documents = [tokens(1, n) for n in (11, 1, 19)]
    found = {layout: pad(documents, layout) for layout in ("left", "right", "inside")}
    ids, mask = found["left"]
    empty = mask.clone()
    empty[1] = 0
    return found | {"none": (ids, torch.ones_like(mask)), "an empty row": (ids, empty), "all": (ids, mask * 0)}


@torch.no_grad()
def test_padded_batches_compile_without_a_break():
    """With the cache that a model in evaluation mode makes, which then goes on like one that was made eagerly."""
    model = small_model(KINDS, attn_logits_scaling="hype 50")
    graph = compiled(model, fullgraph=True)
    for layout, (ids, mask) in batches().items():
        expected, result = model(ids, attention_mask=mask), graph(ids, attention_mask=mask)
        assert_close(result.logits, expected.logits, msg=layout)
        assert result.past_key_values.lengths.tolist() == mask.sum(1).tolist()
        for length in (1, 12):
            following, mask = tokens(3, length), torch.cat([mask, torch.ones_like(mask[:, :length])], dim=1)
            caches = expected.past_key_values, result.past_key_values
            logits = [model(following, attention_mask=mask, past_key_values=cache).logits for cache in caches]
            assert_close(logits[1], logits[0], msg=f"{layout}, {length} tokens")


def test_padded_training_compiles_without_a_break():
    model = small_model(KINDS).train()
    ids, mask = batches()["inside"]
    labels = ids.masked_fill(mask == 0, -100)

    def gradients(call):
        model.zero_grad()
        loss = call(ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        return {"loss": loss.detach()} | {name: x.grad.clone() for name, x in model.named_parameters()}

    expected = gradients(model)
    for name, value in gradients(compiled(model, fullgraph=True)).items():
        assert value.abs().max() > 0, name
        assert_close(value, expected[name], msg=name)


@torch.no_grad()
def test_padded_pieces_compile():
    """Steps and long pieces that continue a cache, with padding in the middle."""
    model = small_model(["attn", "gdn", "mamba2"])
    graph = compiled(model)
    ids = tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[0, :13], mask[1, 17:24] = 0, 0
    caches, start = [None, None], 0
    for end in (10, 11, 29):
        logits = []
        for i, call in enumerate((model, graph)):
            outputs = call(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=caches[i], use_cache=True)
            caches[i] = outputs.past_key_values
            logits.append(outputs.logits)
        assert_close(logits[1], logits[0], msg=f"up to {end}")
        start = end


@pytest.mark.parametrize("strict", [False, True])
@torch.no_grad()
def test_export_with_a_mask(strict):
    model = small_model(KINDS)
    ids, mask = batches()["left"]
    batch, length = torch.export.Dim("batch", min=2), torch.export.Dim("length", min=2)
    shapes = {"input_ids": {0: batch, 1: length}, "attention_mask": {0: batch, 1: length}}
    program = torch.export.export(model, (ids,), {"attention_mask": mask}, dynamic_shapes=shapes, strict=strict)
    run = program.module()
    for layout, (other, kept) in batches().items():
        expected = model(other, attention_mask=kept, use_cache=False).logits
        assert_close(run(other, attention_mask=kept).logits, expected, msg=layout)
    other = tokens(5, 7)
    expected = model(other, use_cache=False).logits
    result = run(other, attention_mask=torch.ones_like(other)).logits
    assert_close(result, expected)
    with pytest.raises(RuntimeError, match="attention_mask must hold only 0 and 1"):
        run(ids, attention_mask=2 * mask)


@torch.no_grad()
def test_export_without_a_mask_returns_no_cache():
    model = small_model(KINDS)
    ids = tokens(2, 9)
    program = torch.export.export(model, (ids,))
    outputs = program.module()(ids)
    assert outputs.past_key_values is None
    assert_close(outputs.logits, model(ids).logits)


@torch.no_grad()
def test_masks_that_no_graph_can_read():
    model = small_model(KINDS)
    ids, mask = batches()["left"]
    graph = compiled(model, fullgraph=True)
    with pytest.raises(RuntimeError, match="attention_mask must hold only 0 and 1"):
        graph(ids, attention_mask=2 * mask)
    with pytest.raises(ValueError, match=r"must be bool or integer where the model is compiled .* got torch.float32"):
        compiled(model)(ids, attention_mask=mask.float())


# ---- packed documents


@pytest.mark.parametrize("mask", [None, "ones", "padding"])
@pytest.mark.parametrize("rows", [1, 2])
@torch.no_grad()
def test_packed_positions_compile(rows, mask):
    model = small_model(KINDS)
    ids = tokens(rows, 12)
    positions = torch.cat([POSITIONS, POSITIONS.flip(0).roll(3, 1)])[:rows]
    given = {"position_ids": positions, "use_cache": None}
    if mask is not None:
        given["attention_mask"] = torch.ones_like(ids)
        given["attention_mask"][:, 9:] = mask == "ones"
    expected = model(ids, **given).logits
    assert_close(compiled(model)(ids, **given).logits, expected)
    apart = model(ids, **given | {"position_ids": torch.arange(12)[None]}).logits
    assert (apart - expected).abs().max() > 0.1


@torch.no_grad()
def test_boundaries_compile_and_export():
    model = small_model(KINDS)
    ids, bounds = tokens(1, 12), torch.tensor([0, 4, 9, 10, 12], dtype=torch.int32)
    expected = model(ids, position_ids=POSITIONS).logits
    for positions in (None, POSITIONS):
        given = {"cu_seqlens": bounds, "position_ids": positions}
        assert_close(compiled(model, fullgraph=True)(ids, **given).logits, expected)
        program = torch.export.export(model, (ids,), given)
        assert_close(program.module()(ids, **given).logits, expected)


def test_positions_that_no_graph_can_read_ask_for_boundaries():
    model = small_model(KINDS)
    ids = tokens(1, 12)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="position_ids must come with cu_seqlens"):
        compiled(model, fullgraph=True)(ids, position_ids=POSITIONS)
    for strict in (False, True):
        with pytest.raises((ValueError, torch._dynamo.exc.Unsupported), match="position_ids must come with cu_seqlens"):
            torch.export.export(model, (ids,), {"position_ids": POSITIONS}, strict=strict)


def test_a_script_trace_does_not_bake_a_decision_in():
    model = small_model(KINDS).requires_grad_(False)
    ids, mask = batches()["left"]
    trace = torch.jit.trace(lambda x, kept: model(x, attention_mask=kept, use_cache=False).logits, (ids, mask))
    other, kept = batches()["an empty row"]
    assert_close(trace(other, kept), model(other, attention_mask=kept).logits)
    with pytest.raises(ValueError, match="position_ids must come with cu_seqlens"):
        torch.jit.trace(lambda x, positions: model(x, position_ids=positions).logits, (ids[:1, :12], POSITIONS))


def test_trainer_compiles_flattened_batches(tmp_path):
    """The losses of transformers' padding-free training are the same with `torch_compile`."""
    documents = [{"input_ids": torch.randint(1, VOCABULARY, (n,)).tolist()} for n in (5, 9, 3, 7, 6, 4)]

    def losses(**options):
        torch._dynamo.reset()
        torch.manual_seed(0)
        arguments = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=2,
            max_steps=3,
            logging_steps=1,
            learning_rate=1e-2,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            **options,
        )
        model = small_model(KINDS, torch.float32)
        trainer = Trainer(model, arguments, train_dataset=documents, data_collator=DataCollatorWithFlattening())
        trainer.train()
        return [record["loss"] for record in trainer.state.log_history if "loss" in record]

    expected = losses()
    assert len(expected) == 3
    assert losses(torch_compile=True, torch_compile_backend="eager") == pytest.approx(expected, rel=1e-5)
