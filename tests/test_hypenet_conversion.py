"""from_teacher: a teacher's weights in a HypeNet, for the whole model or a single mixer."""

import pytest
import torch
from compare import assert_matches_reference
from hypenet_models import small_teacher, tokens

from hypenet import (
    GatedDeltaNet,
    HypeNetForCausalLM,
    LightningAttention,
    Mamba2,
    MixerContext,
    SoftmaxAttention,
    from_teacher,
)
from hypenet.conversion import config_from_teacher

TEACHER_FORM = {"attn_use_rope": True, "attn_use_output_gate": False}


def layer_inputs(teacher, layer_idx, length=25):
    """Return the input of the teacher's mixer in one layer, [2, length, hidden], and a context for ours."""
    hidden = torch.randn(2, length, teacher.config.hidden_size, dtype=teacher.dtype)
    positions = torch.arange(length)[None]
    x = teacher.model.layers[layer_idx].input_layernorm(hidden)
    return x, MixerContext(teacher.model.rotary_emb(x, positions))


@pytest.mark.parametrize("mixer", ["lightning", "gdn", "mamba2"])
def test_heads_are_repeated_not_rows(mixer):
    teacher = small_teacher(attention_bias=True)
    student = from_teacher(teacher, [1, 3], mixer=mixer, gate_init="random")
    for i, (own, given) in enumerate(zip(student.model.layers, teacher.model.layers, strict=True)):
        repeats = [0, 1] if i in (1, 3) else [0, 0, 1, 1]
        for name in ("k_proj", "v_proj"):
            heads = getattr(given.self_attn, name).weight.unflatten(0, (2, 16))
            assert torch.equal(getattr(own.self_attn, name).weight, heads[repeats].flatten(0, 1))
        for name in ("q_proj", "o_proj", "q_norm", "k_norm"):
            assert torch.equal(getattr(own.self_attn, name).weight, getattr(given.self_attn, name).weight)
        for name in ("k_proj", "v_proj"):
            heads = getattr(given.self_attn, name).bias.unflatten(0, (2, 16))
            assert torch.equal(getattr(own.self_attn, name).bias, heads[repeats].flatten())
        for name in ("q_proj", "o_proj"):
            assert torch.equal(getattr(own.self_attn, name).bias, getattr(given.self_attn, name).bias)
        assert torch.equal(own.mlp.down_proj.weight, given.mlp.down_proj.weight)


@pytest.mark.parametrize("mixer_class", [LightningAttention, GatedDeltaNet, Mamba2])
def test_unshared_heads_give_the_same_outputs(mixer_class):
    teacher = small_teacher()
    attention = teacher.model.layers[2].self_attn
    x, context = layer_inputs(teacher, 2)
    shared = mixer_class.from_attention(
        attention, config_from_teacher(teacher.config, [], lightning_nkv=2, gdn_nkv=2, mamba2_nkv=2), 2
    )
    unshared = mixer_class.from_attention(attention, config_from_teacher(teacher.config, []), 2)
    assert shared.k_proj.out_features == 32 and unshared.k_proj.out_features == 64
    new = {name: value for name, value in shared.state_dict().items() if not name.startswith(("k_proj", "v_proj"))}
    unshared.load_state_dict(new, strict=False)
    assert_matches_reference("y", unshared(x, context), shared(x, context))


def test_teacher_is_untouched_and_shares_nothing():
    teacher = small_teacher(tie_word_embeddings=False)
    before = {name: x.clone() for name, x in teacher.state_dict().items()}
    student = from_teacher(teacher, [0])
    assert student.dtype == teacher.dtype and not student.training
    assert torch.equal(student.lm_head.weight, teacher.lm_head.weight)
    assert not torch.equal(student.lm_head.weight, student.model.embed_tokens.weight)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    for name, x in teacher.state_dict().items():
        assert torch.equal(x, before[name]), name


def test_tied_head_stays_tied():
    student = from_teacher(small_teacher(tie_word_embeddings=True), [0])
    assert student.lm_head.weight is student.model.embed_tokens.weight


def test_kept_layers_lose_positions_and_gain_a_gate():
    student = from_teacher(small_teacher(), [1], logit_scale_base=100, gate_init="random")
    layer = student.model.layers[1].self_attn
    assert isinstance(layer, SoftmaxAttention) and not layer.use_rope
    assert 0.01 < layer.o_gate.weight.std() < 0.03
    assert student.config.attn_logits_scaling == "hype 100"


def test_open_gates_change_nothing():
    teacher = small_teacher()
    attention = teacher.model.layers[0].self_attn
    x, context = layer_inputs(teacher, 0)
    gated = SoftmaxAttention.from_attention(attention, config_from_teacher(teacher.config, [0]), 0, gate_init="open")
    without = config_from_teacher(teacher.config, [0], attn_use_output_gate=False)
    bare = SoftmaxAttention.from_attention(attention, without, 0)
    assert_matches_reference("y", gated(x, context), bare(x, context))
    gated(x, context).sum().backward()
    assert gated.o_gate.weight.grad.abs().max() > 0


@pytest.mark.parametrize("mixer_class", [LightningAttention, GatedDeltaNet, Mamba2])
def test_recurrent_gates_are_random_in_both_cases(mixer_class):
    teacher = small_teacher()
    config = config_from_teacher(teacher.config, [])
    made = []
    for gate_init in ("open", "random"):
        torch.manual_seed(3)
        made.append(mixer_class.from_attention(teacher.model.layers[0].self_attn, config, 0, gate_init))
    for name, value in made[0].state_dict().items():
        assert torch.equal(value, made[1].state_dict()[name]), name
    gate = made[0].z_proj if mixer_class is LightningAttention else made[0].g_proj
    assert gate.weight.std() > 0.01


def test_standalone_mixer_equals_the_layer_in_the_model():
    """A mixer called alone on the teacher's hidden states gives what it gives when swapped into the model."""
    teacher = small_teacher()
    student = from_teacher(teacher, range(4), **TEACHER_FORM)
    ids = tokens(2, 25)
    with torch.no_grad():
        expected = student(ids).logits
        seen = []
        hook = student.model.layers[2].self_attn.register_forward_hook(lambda _, args, y: seen.append((args[0], y)))
        student(ids)
        hook.remove()
        x, y = seen[0]
        context = MixerContext(teacher.model.rotary_emb(x, torch.arange(25)[None]))
        assert_matches_reference("teacher", student.model.layers[2].self_attn(x, context), y)

        twin = LightningAttention.from_attention(teacher.model.layers[2].self_attn, student.config, 2)
        former = student.swap_mixer(2, twin)
        assert student.config.mixer_types == ["attn", "attn", "lightning-attn", "attn"]
        assert student.config.layer_types[2] == "linear_attention"
        swapped = student(ids).logits
        assert not torch.allclose(swapped, expected)
        assert_matches_reference(
            "twin", swapped, from_teacher(teacher, [0, 1, 3], mixers={2: twin}, **TEACHER_FORM)(ids).logits
        )
        assert torch.equal(
            student.generate(ids, max_new_tokens=5, do_sample=False),
            student.generate(ids, max_new_tokens=5, do_sample=False, use_cache=False),
        )
        assert student.swap_mixer(2, former) is twin
        assert torch.equal(student(ids).logits, expected)


def test_packed_documents_through_one_mixer():
    teacher = small_teacher()
    mixer = LightningAttention.from_attention(
        teacher.model.layers[1].self_attn, config_from_teacher(teacher.config, []), 1
    )
    x = torch.randn(1, 30, teacher.config.hidden_size, dtype=teacher.dtype)
    bounds = torch.tensor([0, 11, 30], dtype=torch.int32)
    positions = torch.cat([torch.arange(11), torch.arange(19)])[None]
    packed = mixer(x, MixerContext(teacher.model.rotary_emb(x, positions), cu_seqlens=bounds))
    alone = [
        mixer(part, MixerContext(teacher.model.rotary_emb(part, torch.arange(part.shape[1])[None])))
        for part in (x[:, :11], x[:, 11:])
    ]
    assert_matches_reference("y", packed, torch.cat(alone, dim=1))


def test_from_a_folder(tmp_path):
    teacher = small_teacher(torch.float32)
    teacher.generation_config.eos_token_id = 5
    teacher.save_pretrained(tmp_path / "teacher")
    torch.manual_seed(1)
    student = from_teacher(tmp_path / "teacher", [0, 2])
    torch.manual_seed(1)
    same = from_teacher(teacher, [0, 2])
    ids = tokens(1, 9)
    with torch.no_grad():
        assert torch.equal(student(ids).logits, same(ids).logits)
    assert student.generation_config.eos_token_id == 5
    student.save_pretrained(tmp_path / "student")
    with torch.no_grad():
        assert torch.equal(HypeNetForCausalLM.from_pretrained(tmp_path / "student")(ids).logits, same(ids).logits)


def test_refusals():
    teacher = small_teacher()
    with pytest.raises(ValueError, match=r"keep_layers must lie in 0..3, got \[1, 4\]"):
        from_teacher(teacher, [1, 4])
    with pytest.raises(ValueError, match=r"mixer must be one of .* got 'mamba'"):
        from_teacher(teacher, [1], mixer="mamba")
    with pytest.raises(ValueError, match=r"from_attention: gate_init must be one of .* got 'half'"):
        from_teacher(teacher, [1], gate_init="half")
    config = config_from_teacher(teacher.config, [])
    gdn = GatedDeltaNet.from_attention(teacher.model.layers[0].self_attn, config, 0)
    with pytest.raises(ValueError, match=r"mixers\[0\] must be of kind 'lightning-attn' .* got 'gdn'"):
        from_teacher(teacher, [1], mixers={0: gdn})
    with pytest.raises(ValueError, match="must be for layer 2, got one for layer 0"):
        from_teacher(teacher, [1]).swap_mixer(2, gdn)
    biased = small_teacher(attention_bias=True).model.layers[0].self_attn
    with pytest.raises(ValueError, match=r"projections .* missing \[\], unknown \['k_proj.bias', 'o_proj.bias'"):
        LightningAttention.from_attention(biased, config, 0)
