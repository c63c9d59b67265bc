"""The closed forms of a calibration have the properties that define them, on every mixer that has what they set."""

import copy
import math

import pytest
import torch
from compare import assert_matches_reference, rms
from halo_tiny import LAYERS, tiny_teacher
from torch import nn

from halo import models
from halo.calibration import faithful, parts
from halo.calibration.choice import APPLICABLE, AUTO, chosen_parts
from halo.calibration.layer import LayerData, input_of, observed_layers, relative_error, run_twin
from halo.calibration.settings import CalibrateSettings
from halo.calibration.statistics import constant_direction, measure
from halo.data import Batch
from halo.stages.calibrate import Calibration
from hypenet import config_from_teacher
from hypenet.mixers import LightningAttention, alibi_log_decay

VOCABULARY, SEQUENCES, LENGTH = 61, 4, 48
MIXERS = ("lightning", "gdn", "mamba2")
LAYER = 1


def random_batch(seed=0, sequences=SEQUENCES, length=LENGTH, documents=1):
    ids = torch.randint(VOCABULARY, (sequences, length), generator=torch.Generator().manual_seed(seed))
    boundaries = torch.arange(length) * documents // length
    return Batch(ids, boundaries.int().expand(sequences, -1).contiguous())


def observe(teacher, batch, isolate=False):
    """Return the data of every layer."""
    found = {}
    with torch.no_grad(), observed_layers(teacher, batch, isolate, found.__setitem__):
        models.hidden_states(teacher, batch, isolate)
    return found


@pytest.fixture(scope="module")
def teacher():
    """A teacher whose layers' inputs have a mean, as those of trained models do, and whose heads differ."""
    model = tiny_teacher(vocab_size=VOCABULARY)
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(torch.linspace(-0.1, 0.1, 32))
        for block in model.model.layers:
            block.self_attn.q_norm.weight.mul_(2.0)
    return model


@pytest.fixture(scope="module")
def data(teacher):
    return observe(teacher, random_batch())[LAYER]


def attention_of(teacher):
    return teacher.model.layers[LAYER].self_attn


def twin_of(teacher, mixer):
    torch.manual_seed(3)
    return models.make_twins(teacher, mixer)[LAYER].requires_grad_(False)


def fit_of(teacher, data, **options):
    return parts.Fit(data, measure(attention_of(teacher), data), **options)


def calibrated(teacher, data, mixer, *names, **options):
    twin, fit = twin_of(teacher, mixer), fit_of(teacher, data, **options)
    for name in names:
        parts.PARTS[name](twin, fit)
    return twin


# Statistics


@pytest.mark.parametrize("sinks", [0, 1, 5])
@pytest.mark.parametrize("block", [1, 7, 48, 100])
def test_streamed_statistics_equal_those_of_whole_matrices(sinks, block):
    teacher = tiny_teacher(vocab_size=VOCABULARY).double()
    batch = random_batch(seed=2)
    attention, data = attention_of(teacher), observe(teacher, batch)[LAYER]
    found = measure(attention, data, sinks, block, least_distance=0.5)
    with torch.no_grad():
        q, k = (
            norm(projection(data.x_NTC).unflatten(-1, (-1, 8)))
            for norm, projection in ((attention.q_norm, attention.q_proj), (attention.k_norm, attention.k_proj))
        )
        angles = torch.arange(LENGTH)[:, None] * 1e4 ** (-torch.arange(4) / 4).double()
        turn = torch.polar(torch.ones_like(angles), angles)[:, None]
        q, k = (torch.view_as_complex(torch.stack(x.chunk(2, -1), -1)) * turn for x in (q, k))
        scores = torch.einsum("nthd,nshd->nhts", q, k.repeat_interleave(2, 2).conj()).real / math.sqrt(8)
    scores = scores.masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -torch.inf)
    teacher.set_attn_implementation("eager")
    with torch.no_grad():  # transformers' softmax is in float32
        theirs = teacher(batch.input_ids, output_attentions=True).attentions[LAYER]
    torch.testing.assert_close(scores.softmax(-1), theirs, rtol=1e-5, atol=1e-7)
    p = scores[:, :, sinks:, sinks:].softmax(-1)
    places = torch.arange(LENGTH - sinks)
    distance = (places[:, None] - places).clamp(min=0.5).double()
    torch.testing.assert_close(found.look_back_H, (p * distance).sum(-1).mean((0, 2)), rtol=1e-7, atol=0)
    torch.testing.assert_close(found.entropy_H, torch.special.entr(p).sum(-1).mean((0, 2)), rtol=1e-7, atol=0)


def test_documents_are_measured_as_if_alone(teacher):
    batch = random_batch(documents=3)
    packed = measure(attention_of(teacher), observe(teacher, batch, isolate=True)[LAYER], sinks=2, block=10)
    third = LENGTH // 3
    pieces = [batch.input_ids[:, start : start + third] for start in range(0, LENGTH, third)]
    rows = torch.cat(pieces)
    alone = observe(teacher, Batch(rows, torch.zeros_like(rows, dtype=torch.int32)))[LAYER]
    expected = measure(attention_of(teacher), alone, sinks=2)
    torch.testing.assert_close(packed.look_back_H, expected.look_back_H, rtol=1e-5, atol=0)
    torch.testing.assert_close(packed.entropy_H, expected.entropy_H, rtol=1e-5, atol=0)
    whole = measure(attention_of(teacher), observe(teacher, batch)[LAYER], sinks=2)
    assert (whole.look_back_H > 1.5 * packed.look_back_H).all()


@pytest.mark.parametrize("sinks", [0, 3])
def test_even_attention_looks_back_half_of_what_is_left(teacher, data, sinks):
    attention = copy.deepcopy(attention_of(teacher))
    nn.init.zeros_(attention.q_proj.weight)
    found = measure(attention, data, sinks)
    counts = torch.arange(1, LENGTH - sinks + 1).double()
    torch.testing.assert_close(found.look_back_H, ((counts - 1) / 2).mean().expand(4), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.entropy_H, counts.log().mean().expand(4), rtol=1e-6, atol=0)


def test_attention_to_the_first_token_does_not_count():
    """All heads attend to the first token with a probability near 1, and evenly to the others."""
    attention = attention_of(tiny_teacher(vocab_size=VOCABULARY))
    attention.q_norm, attention.k_norm = nn.Identity(), nn.Identity()
    attention.requires_grad_(False)
    for projection in (attention.q_proj, attention.k_proj):
        nn.init.zeros_(projection.weight)
        projection.weight[::8, 0] = 1.0
    x_NTC = torch.zeros(1, LENGTH, 32)
    x_NTC[..., 0] = 10.0
    x_NTC[:, 1:, 0] = 0.5
    ones, documents = torch.ones(1, LENGTH, 8), torch.zeros(1, LENGTH, dtype=torch.int32)
    data = LayerData(x_NTC, x_NTC, x_NTC, ones, torch.zeros_like(ones), documents)
    sunk, free = measure(attention, data, sinks=0), measure(attention, data, sinks=1)
    counts = torch.arange(LENGTH - 1).double()
    torch.testing.assert_close(free.look_back_H, (counts / 2).mean().expand(4), rtol=1e-5, atol=0)
    assert (sunk.look_back_H > free.look_back_H).all()


def test_a_document_of_sinks_alone_is_no_error(teacher, data):
    found = measure(attention_of(teacher), data, sinks=LENGTH)
    assert found.look_back_H.tolist() == [0] * 4
    twin = twin_of(teacher, "gdn")
    parts.decay(twin, parts.Fit(data, found))
    assert torch.isfinite(twin.decay_bias()).all()


# Parts


@pytest.mark.parametrize("mixer", MIXERS)
def test_half_lives_are_what_heads_look_back(teacher, data, mixer):
    twin = calibrated(teacher, data, mixer, "decay")
    look_back_H = measure(attention_of(teacher), data).look_back_H
    if mixer == "lightning":
        rate = -twin.log_decay
    else:
        A_log, dt_bias = twin.decay_bias()
        rate = A_log.exp() * nn.functional.softplus(dt_bias)
        assert not (twin.a_proj if mixer == "gdn" else twin.dt_proj).weight.any()
    assert len(set(look_back_H.tolist())) == 4
    torch.testing.assert_close((-rate.double() * look_back_H).exp(), torch.full((4,), 0.5).double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("look_back", [1e-9, 0.5, 1.0, 30.0, 4095.0, 1e6])
def test_half_lives_of_any_length_are_finite(teacher, data, look_back):
    statistics = measure(attention_of(teacher), data)
    statistics.look_back_H.fill_(look_back)
    for mixer in MIXERS:
        twin = twin_of(teacher, mixer)
        parts.decay(twin, parts.Fit(data, statistics))
        rate = -twin.log_decay if mixer == "lightning" else nn.functional.softplus(twin.decay_bias.dt_bias)
        expected = math.log(2) / max(look_back, 0.5)
        torch.testing.assert_close(rate, torch.full((4,), expected), rtol=1e-5, atol=0)


def test_the_constant_direction_is_the_least_squares_one(data):
    x = data.x_NTC.flatten(0, 1).double()
    row = constant_direction(data, eps=1e-13)
    torch.testing.assert_close((x @ row).mean(), torch.tensor(1.0).double())
    solution = torch.linalg.lstsq(x, torch.ones(len(x), 1).double()).solution[:, 0]
    torch.testing.assert_close(row, solution / (x @ solution).mean(), rtol=1e-3, atol=1e-3 * rms(solution))
    mean = x.mean(0)
    along = x @ mean / mean.square().sum()
    assert (x @ constant_direction(data)).std() < 0.9 * along.std()


def test_write_strengths_have_the_mean_that_is_aimed_at(teacher, data):
    twin, fit = calibrated(teacher, data, "gdn", "beta"), fit_of(teacher, data)
    aim = 0.3 + 0.4 * parts.concentration(fit.statistics.entropy_H)
    assert aim.min().item() == pytest.approx(0.3) and aim.max().item() == pytest.approx(0.7)
    assert aim.argmin() == fit.statistics.entropy_H.argmax()
    beta = 2 * twin.b_proj(data.x_NTC).sigmoid()
    torch.testing.assert_close(beta.mean((0, 1)).double(), aim, rtol=0, atol=0.05)


def test_gates_are_open_in_the_mean(teacher, data):
    twin = calibrated(teacher, data, "gdn", "gate")
    assert nn.functional.silu(torch.tensor(parts.OPEN, dtype=torch.float64)).item() == pytest.approx(1, abs=1e-12)
    opened = nn.functional.silu(twin.g_proj(data.x_NTC))
    assert (opened.mean((0, 1)) - 1).abs().max() < 0.1 and opened.std() < 0.5


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("mixer", MIXERS)
def test_gain_is_where_a_numeric_minimisation_ends(teacher, data, mixer, per_head):
    before = twin_of(teacher, mixer)
    pairs = [(input_of(before.o_proj, before, one)[0].double(), one.context_NTW.double()) for one in data.sequences()]
    f, c = (torch.cat(list(tensors)).flatten(0, 1) for tensors in zip(*pairs, strict=True))
    factors = torch.ones(4 if per_head else 32, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([factors], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-15)

    def loss():
        optimizer.zero_grad()
        value = (f * factors.repeat_interleave(32 // len(factors)) - c).square().mean()
        value.backward()
        return value

    for _ in range(20):
        optimizer.step(loss)
    expected = factors.detach().repeat_interleave(32 // len(factors))
    after = calibrated(teacher, data, mixer, "gain", per_head=per_head)
    if mixer == "lightning":
        found = after.o_norm.weight / before.o_norm.weight
        assert torch.equal(after.o_proj.weight, before.o_proj.weight)
    else:
        found = (after.o_proj.weight / before.o_proj.weight).mean(0)
        assert torch.equal(after.o_norm.weight, before.o_norm.weight)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_gain_of_a_channel_without_output_is_one(teacher, data):
    twin = twin_of(teacher, "lightning")
    nn.init.zeros_(twin.v_proj.weight)
    before = twin.o_norm.weight.clone()
    parts.gain(twin, fit_of(teacher, data))
    assert torch.equal(twin.o_norm.weight, before)


def test_a_factor_of_values_is_undone_by_the_norm(teacher, data):
    twin = twin_of(teacher, "gdn")
    twin.o_norm.eps = 1e-12
    before = run_twin(twin, data)
    twin.v_proj.weight.mul_(7.0)
    assert_matches_reference("scaled values", run_twin(twin, data), before.double())


def test_ridge_in_its_limits(teacher, data):
    start = twin_of(teacher, "lightning")
    weights, errors = [], []
    for eps in (1e12, 1.0, 1e-3, 1e-12):
        twin = calibrated(teacher, data, "lightning", "ridge", ridge_eps=eps)
        weights.append(twin.o_proj.weight.double())
        errors.append(relative_error(twin, data))
    torch.testing.assert_close(weights[0], start.o_proj.weight.double(), rtol=1e-6, atol=1e-9)
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.8 * errors[0]
    features = torch.cat([input_of(start.o_proj, start, one)[0] for one in data.sequences()]).flatten(0, 1)
    solution = torch.linalg.lstsq(features.double(), data.y_NTC.flatten(0, 1).double()).solution.T
    torch.testing.assert_close(weights[-1], solution, rtol=1e-3, atol=1e-3 * rms(solution))


def test_rank_gives_slow_decays_to_heads_that_look_far(teacher, data):
    twin, look_back_H = calibrated(teacher, data, "lightning", "rank"), fit_of(teacher, data).statistics.look_back_H
    assert twin.log_decay.sort().values.tolist() == alibi_log_decay(4).sort().values.tolist()
    assert twin.log_decay.argsort().tolist() == look_back_H.argsort().tolist()
    assert not torch.equal(twin.log_decay, alibi_log_decay(4))


def test_permuted_heads_equal_reassigned_slopes(teacher, data):
    reassigned = calibrated(teacher, data, "lightning", "rank", "gain")
    permuted = copy.deepcopy(reassigned)
    parts.restore_slopes(permuted)
    assert torch.equal(permuted.log_decay, alibi_log_decay(4))
    assert not torch.equal(permuted.q_proj.weight, reassigned.q_proj.weight)
    expected = run_twin(reassigned, data)
    assert rms(run_twin(permuted, data) - expected) < 2e-6 * rms(expected)


def test_biases_are_permuted_too(teacher, data):
    config = config_from_teacher(teacher.config, [], "lightning", attention_qkv_bias=True, attention_o_bias=True)
    torch.manual_seed(0)
    twin = LightningAttention(config, LAYER).requires_grad_(False)
    for name, parameter in twin.named_parameters():
        if name.endswith(".bias"):
            nn.init.normal_(parameter)
    parts.rank(twin, fit_of(teacher, data))
    expected = run_twin(twin, data)
    parts.restore_slopes(twin)
    assert torch.equal(twin.log_decay, alibi_log_decay(4))
    assert rms(run_twin(twin, data) - expected) < 2e-6 * rms(expected)


def test_heads_that_share_keys_keep_their_reassigned_slopes(teacher, data):
    config = config_from_teacher(teacher.config, [], "lightning", lightning_nkv=2)
    twin = LightningAttention.from_attention(attention_of(teacher), config, LAYER).requires_grad_(False)
    parts.rank(twin, fit_of(teacher, data))
    before = {name: value.clone() for name, value in twin.state_dict().items()}
    parts.restore_slopes(twin)
    assert all(torch.equal(value, before[name]) for name, value in twin.state_dict().items())
    assert not torch.equal(twin.log_decay, alibi_log_decay(4))


def test_documents_in_one_sequence_do_not_see_each_other(teacher):
    batch = random_batch(documents=2)
    packed = observe(teacher, batch, isolate=True)[LAYER]
    half = LENGTH // 2
    alone = observe(teacher, Batch(batch.input_ids[:, half:], batch.document_ids[:, half:]))[LAYER]
    for mixer in MIXERS:
        twin = twin_of(teacher, mixer)
        for found, expected in (
            (packed.y_NTC[:, half:], alone.y_NTC),
            (run_twin(twin, packed)[:, half:], run_twin(twin, alone)),
        ):
            assert_matches_reference("second document", found, expected.double())


# All of it, for one layer


def calibrate(teacher, mixer, text="auto", seed=0, **settings):
    """Calibrate the twin of a layer on 6 sequences and 2, and return it with what is reported."""
    data = observe(teacher, random_batch(seed, sequences=8))[LAYER]
    calibration = Calibration(
        chosen_parts(text, mixer), CalibrateSettings(samples=6, held_samples=2, sinks=1, **settings), seed
    )
    twin = twin_of(teacher, mixer)
    return twin, calibration.apply(LAYER, twin, attention_of(teacher), data)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("mixer", MIXERS)
def test_calibration_lowers_the_error_on_other_text_and_is_repeatable(teacher, mixer, seed):
    (twin, row), (again, same) = (calibrate(teacher, mixer, seed=seed) for _ in range(2))
    assert row == same and all(
        torch.equal(value, again.state_dict()[name]) for name, value in twin.state_dict().items()
    )
    assert len(row["errors"]) == 1 + len(AUTO[mixer])
    assert row["errors"][-1] < 0.9 * row["errors"][0]
    best = calibrate(teacher, mixer, "+".join((*AUTO[mixer], "ridge")), seed=seed)[1]
    assert best["errors"][:-1] == row["errors"] and best["errors"][-1] < row["errors"][-1]


def test_errors_are_those_of_the_twin_that_is_returned(teacher):
    for mixer in MIXERS:
        twin, row = calibrate(teacher, mixer)
        held = observe(teacher, random_batch(sequences=8))[LAYER][6:]
        assert relative_error(twin, held) == pytest.approx(row["errors"][-1], rel=1e-5)


@pytest.mark.parametrize("mixer", MIXERS)
def test_bfloat16_arithmetic_calibrates_alike(teacher, mixer):
    expected = calibrate(teacher, mixer)[1]
    with torch.autocast("cpu", torch.bfloat16):
        twin, row = calibrate(copy.deepcopy(teacher).bfloat16(), mixer)
    assert row["errors"] == pytest.approx(expected["errors"], rel=0.03)
    assert row["look_back"] == pytest.approx(expected["look_back"], rel=0.03)
    assert {value.dtype for value in twin.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_part_sets_what_it_names_and_nothing_else(teacher, mixer):
    sets = {
        "rank": {"log_decay"},
        "decay": {"log_decay", "decay_bias.A_log", "decay_bias.dt_bias", "a_proj.weight", "dt_proj.weight"},
        "beta": {"b_proj.weight"},
        "gate": {"g_proj.weight"},
        "gain": {"o_norm.weight" if mixer == "lightning" else "o_proj.weight"},
        "ridge": {"o_proj.weight"},
    }
    start = twin_of(teacher, mixer).state_dict()
    data = observe(teacher, random_batch())[LAYER]
    for part in APPLICABLE[mixer]:
        found = calibrated(teacher, data, mixer, part).state_dict()
        changed = {name for name, value in found.items() if not torch.equal(value, start[name])}
        assert changed == sets[part] & start.keys()


# The published form


def test_faithful_has_the_named_defects(teacher, data):
    attention, twin = attention_of(teacher), twin_of(teacher, "gdn")
    faithful.calibrate(twin, attention, data, seed=0)
    # 1. Rows in place of heads: channels 2c and 2c + 1 of a pair of heads are the same.
    assert torch.equal(twin.k_proj.weight[0::2], twin.k_proj.weight[1::2])
    assert torch.equal(twin.k_proj.weight[0::2], attention.k_proj.weight)
    assert twin.q_norm.weight.eq(1).all() and twin.k_norm.weight.eq(1).all()
    # 2. and 3. The distance counts the first tokens; the rate depends on the input.
    look_back_H = measure(attention, data, sinks=0, least_distance=0.5).look_back_H
    rate = nn.functional.softplus(twin.decay_bias.dt_bias).double()
    torch.testing.assert_close(rate, math.log(2) / look_back_H, rtol=1e-5, atol=0)
    assert twin.a_proj.weight.std().item() == pytest.approx(0.02, rel=0.3)
    # 4. The mean of beta is not what is aimed at: the rows have no common direction.
    aim = 0.3 + 0.4 * parts.concentration(measure(attention, data, least_distance=0.5).entropy_H)
    torch.testing.assert_close(
        twin.b_proj.weight.abs().mean(1).double() * math.sqrt(32), aim.logit().abs(), rtol=1e-5, atol=1e-7
    )
    # 6. What the layer adds is a hundredth of what its attention layer does.
    assert relative_error(twin, data) == pytest.approx(1, abs=0.03)
    ratio = twin.g_proj.weight / twin.v_proj.weight
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-4, atol=0)


def test_factors_of_values_are_where_a_search_finds_them(teacher, data):
    twin = twin_of(teacher, "gdn")
    found = faithful.value_factors(twin, data)
    pairs = [(input_of(twin.o_norm, twin, one)[0], one.context_NTW) for one in data.sequences()]
    o, c = (torch.cat(list(tensors)).double().unflatten(-1, (4, 8)) for tensors in zip(*pairs, strict=True))
    grid = torch.logspace(-1, 1, 4001).double()
    for head in range(4):
        errors = [(s * math.sqrt(8) * o - c)[..., head, :].square().sum() for s in grid]
        assert found[head].item() == pytest.approx(grid[torch.stack(errors).argmin()].item(), rel=2e-3)
    assert ((found >= 0.1) & (found <= 10)).all()


def test_faithful_is_repeatable_by_its_seed(teacher):
    rows = [calibrate(teacher, "gdn", "faithful", seed=seed)[0].b_proj.weight for seed in (0, 0, 1)]
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])


# Names


def test_parts_are_applied_in_one_order():
    assert chosen_parts("ridge+gain+decay", "lightning") == ("decay", "gain", "ridge")
    assert chosen_parts("auto", "gdn") == ("decay", "beta", "gate", "gain")
    assert chosen_parts("faithful", "gdn") == ("faithful",)
    assert chosen_parts("off", "mamba2") == ()
    assert chosen_parts("auto", "gdn", gated=False) == ("decay", "beta", "gain")
    with pytest.raises(ValueError, match=r"calibrate.parts: must be .* got gate"):
        chosen_parts("gate", "gdn", gated=False)
    assert all(set(AUTO[mixer]) <= set(APPLICABLE[mixer]) <= set(parts.PARTS) for mixer in APPLICABLE)


@pytest.mark.parametrize(
    ("text", "mixer"),
    [
        ("beta", "lightning"),
        ("gate+gain", "lightning"),
        ("faithful", "lightning"),
        ("rank", "gdn"),
        ("beta+gain", "mamba2"),
        ("rank+decay", "lightning"),
        ("gain+gain", "lightning"),
        ("faithful+gain", "gdn"),
        ("auto+gain", "gdn"),
        ("", "gdn"),
        ("Gain", "gdn"),
    ],
)
def test_parts_that_a_mixer_lacks_are_refused(text, mixer):
    with pytest.raises(ValueError) as caught:
        chosen_parts(text, mixer)
    message = str(caught.value)
    assert message.startswith("calibrate.parts: must be auto, off") and message.endswith(f", got {text}")
    assert f"for mixer {mixer}" in message and "\n" not in message


def test_every_layer_is_observed_once_and_hooks_are_gone(teacher):
    assert sorted(observe(teacher, random_batch())) == list(range(LAYERS))
    for block in teacher.model.layers:
        assert not block.self_attn._forward_hooks and not block.self_attn.o_proj._forward_pre_hooks
