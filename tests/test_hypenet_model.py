"""HypeNetForCausalLM without a cache: equality with Qwen3, padding, packing, training, saving."""

import copy

import pytest
import torch
from compare import assert_matches_reference
from hypenet_models import MIXED, small_config, small_model, small_teacher, tokens
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from hypenet import HypeNetForCausalLM, HypeNetModel, from_teacher, mixers
from hypenet_kernels import reference

TEACHER_FORM = {"attn_use_rope": True, "attn_use_output_gate": False}


@pytest.mark.parametrize("tied", [True, False])
def test_all_softmax_with_rope_is_qwen3(tied):
    teacher = small_teacher(torch.float32, tie_word_embeddings=tied)
    student = from_teacher(teacher, range(4), **TEACHER_FORM)
    ids = tokens(2, 33)
    with torch.no_grad():
        assert_matches_reference("logits", student(ids).logits, teacher(ids).logits)


def test_qwen3_weights_load_under_their_own_names():
    teacher = small_teacher(torch.float32, tie_word_embeddings=False)
    student = HypeNetForCausalLM(small_config(["attn"] * 4, tie_word_embeddings=False, **TEACHER_FORM)).eval()
    student.load_state_dict(teacher.state_dict())
    ids = tokens(1, 20)
    with torch.no_grad():
        assert_matches_reference("logits", student(ids).logits, teacher(ids).logits)


@pytest.mark.parametrize("layout", ["left", "right", "inside"])
def test_padding_changes_nothing(layout):
    model = small_model(attn_logits_scaling="hype 50")
    documents = [tokens(1, n) for n in (11, 1, 19)]
    ids, mask = pad(documents, layout)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
        for b, document in enumerate(documents):
            alone = model(document).logits[0]
            assert_matches_reference(f"sequence {b}", logits[b][mask[b].bool()], alone)
    hidden = model.model(ids, attention_mask=mask).last_hidden_state
    assert hidden[~mask.bool()].abs().max() == 0


def pad(documents, layout):
    """Return documents [1, n] as one batch, with random tokens as padding, and the mask."""
    width = max(x.shape[1] for x in documents) + 3
    ids, mask = tokens(len(documents), width), torch.zeros(len(documents), width, dtype=torch.long)
    for b, document in enumerate(documents):
        n = document.shape[1]
        places = {
            "left": torch.arange(width - n, width),
            "right": torch.arange(n),
            "inside": torch.randperm(width)[:n].sort().values,
        }[layout]
        ids[b, places], mask[b, places] = document[0], 1
    return ids, mask


@pytest.mark.parametrize("name", ["cu_seqlens", "cu_seq_lens_q", "position_ids"])
def test_packed_documents_do_not_see_each_other(name):
    model = small_model(attn_logits_scaling="hype 50")
    documents = [tokens(1, n) for n in (7, 1, 23)]
    bounds = torch.tensor([0, 7, 8, 31], dtype=torch.int32)
    positions = torch.cat([torch.arange(x.shape[1]) for x in documents])[None]
    packing = {name: positions if name == "position_ids" else bounds}
    with torch.no_grad():
        logits = model(torch.cat(documents, dim=1), **packing).logits
        reference = torch.cat([model(x).logits for x in documents], dim=1)
    assert_matches_reference("logits", logits, reference)


def test_packed_documents_in_a_batch():
    model = small_model()
    rows = [[tokens(1, 5), tokens(1, 8)], [tokens(1, 13)]]
    positions = torch.stack([torch.cat([torch.arange(x.shape[1]) for x in row]) for row in rows])
    with torch.no_grad():
        logits = model(torch.cat([torch.cat(row, dim=1) for row in rows]), position_ids=positions).logits
        reference = torch.stack([torch.cat([model(x).logits[0] for x in row]) for row in rows])
    assert_matches_reference("logits", logits, reference)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_every_parameter(checkpointing):
    model = small_model(gdn_activation="silu").train()
    if checkpointing:
        model.activation_checkpointing_enable()
    ids = tokens(2, 21)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_checkpointing_gives_the_same_gradients():
    model = small_model().train()
    ids = tokens(1, 21)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0

    def gradients():
        model.zero_grad()
        model(ids, attention_mask=mask, labels=ids).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    plain = gradients()
    model.activation_checkpointing_enable()
    for name, gradient in gradients().items():
        assert torch.equal(gradient, plain[name]), name


def test_loss_is_next_token_cross_entropy():
    model = small_model()
    ids = tokens(2, 15)
    with torch.no_grad():
        outputs = model(ids, labels=ids)
        logits = outputs.logits[:, :-1].flatten(0, 1).float()
        assert outputs.loss.item() == pytest.approx(
            torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()).item()
        )
        assert torch.equal(model(ids, logits_to_keep=3).logits, outputs.logits[:, -3:])


def test_hidden_states():
    model = small_model()
    ids = tokens(2, 9)
    with torch.no_grad():
        outputs = model(ids, output_hidden_states=True)
        assert len(outputs.hidden_states) == len(MIXED) + 1
        assert torch.equal(outputs.hidden_states[0], model.model.embed_tokens(ids))
        assert torch.equal(model.lm_head(outputs.hidden_states[-1]), outputs.logits)


@torch.no_grad()
def test_bfloat16_is_as_close_as_eager_bfloat16(monkeypatch):
    exact = small_model(dtype=torch.float64)
    model = copy.deepcopy(exact).to(torch.bfloat16)
    ids = tokens(2, 40)
    result, expected = model(ids).logits, exact(ids).logits
    for module, op in (
        (mixers.softmax, "hype_attention"),
        (mixers.lightning, "chunk_simple_gla"),
        (mixers.gated_delta, "chunk_gated_delta_rule"),
        (mixers.mamba2, "chunk_simple_gla"),
    ):
        monkeypatch.setattr(module, op, in_bfloat16(getattr(reference, op)))
    assert_matches_reference("logits", result, expected, eager=model(ids).logits)


def in_bfloat16(op):
    def eager(*inputs, **options):
        def lower(x):
            return x.bfloat16() if torch.is_tensor(x) and x.is_floating_point() else x

        return op(*map(lower, inputs), **{name: lower(x) for name, x in options.items()})

    return eager


def test_autocast_trains_every_parameter():
    model = small_model(dtype=torch.float32).train()
    ids = tokens(2, 21)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.abs().max() > 0, name


def test_decays_keep_full_precision():
    model = small_model(dtype=torch.float32)
    before = {name: x.clone() for name, x in model.named_parameters() if name.endswith(("A_log", "dt_bias"))}
    decay = model.model.layers[1].self_attn.log_decay.clone()
    model = model.to(torch.bfloat16)
    assert before
    for name, x in before.items():
        assert torch.equal(model.get_parameter(name), x)
    assert torch.equal(model.model.layers[1].self_attn.log_decay, decay)
    assert model.model.layers[1].self_attn.q_proj.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load(tmp_path, tied):
    model = small_model(dtype=torch.float32, tie_word_embeddings=tied, attn_logits_scaling="hype 50")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    assert AutoConfig.from_pretrained(tmp_path).mixer_types == MIXED
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(loaded, HypeNetForCausalLM) and not loaded.training
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    ids = tokens(1, 12)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        backbone = AutoModel.from_pretrained(tmp_path)
        assert isinstance(backbone, HypeNetModel)
        assert torch.equal(backbone(ids).last_hidden_state, model.model(ids).last_hidden_state)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(
        half.model.layers[2].self_attn.decay_bias.A_log, model.model.layers[2].self_attn.decay_bias.A_log
    )
    assert torch.equal(half.model.layers[1].self_attn.log_decay, model.model.layers[1].self_attn.log_decay)


def test_random_initialisation():
    model = HypeNetForCausalLM(small_config())
    delta = model.model.layers[2].self_attn
    assert ((delta.decay_bias.A_log.exp() > 0) & (delta.decay_bias.A_log.exp() < 16)).all()
    step = torch.nn.functional.softplus(delta.decay_bias.dt_bias)
    assert ((step > 9e-4) & (step < 0.11)).all()
    assert 0.01 < model.model.layers[0].self_attn.o_gate.weight.std() < 0.03


def test_refusals():
    model = small_model(["attn", "lightning-attn"])
    ids = tokens(2, 6)
    bounds = torch.tensor([0, 6], dtype=torch.int32)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match=r"attention_mask must have shape \[2, 6\] .* got \[2, 5\]"):
        model(ids, attention_mask=torch.ones(2, 5))
    with pytest.raises(ValueError, match="batch of 1 with cu_seqlens, got 2"):
        model(ids, cu_seqlens=bounds)
    with pytest.raises(ValueError, match="without attention_mask and without a cache"):
        model(ids[:1], cu_seqlens=bounds, use_cache=True)
    with pytest.raises(NotImplementedError, match="output_attentions must be False"):
        model(ids, output_attentions=True)


def test_training_forward_compiles_without_a_break():
    model = small_model(["attn", "lightning-attn", "gdn"], torch.float32).train()
    compiled = torch.compile(model.model, backend="eager", fullgraph=True)
    ids = tokens(2, 21)
    assert torch.equal(compiled(ids).last_hidden_state, model.model(ids).last_hidden_state)
