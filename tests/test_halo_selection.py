"""Policies choose what is known to be right, and choices that the samples do not support are called equivalent."""

from typing import get_args

import numpy as np
import pytest
from halo_synthetic import CHUNKS, EPISODES, SyntheticMeasurer

from halo.config import make_config
from halo.selection import scores
from halo.selection.policies import POLICIES, choose, count_runs, spaced_layers
from halo.selection.results import Resamples, Result, divergence_and_error, drops
from halo.selection.scores import equivalence_lines, equivalent_pairs, published_score, top_layers
from halo.selection.settings import PolicyName, SelectSettings
from halo.selection.variants import one_layer, student, unchanged
from halo.settings import HaloError

# As measured for the demo's teacher: the first layer costs most as a twin, and is worthless without positions.
TWIN = [0.86, 0.55, 0.10, 0.05, 0.08, 0.12, 0.06, 0.11]
NOPE = [3.09, 0.30, 1.09, 0.10, 0.36, 0.22, 0.07, 0.06]


def chosen(measurer, policy, keep=2, **settings):
    return choose(measurer, SelectSettings(policy=policy, keep=keep, bootstrap=200, **settings))


def test_every_policy_has_a_name_in_the_settings():
    assert set(POLICIES) == set(get_args(PolicyName))


def test_position_counts_what_a_kept_layer_loses():
    measurer = SyntheticMeasurer(TWIN, NOPE, noise=0.01)
    choice = chosen(measurer, "position")
    assert choice.layers == [1, 7]
    assert np.allclose(choice.scores, np.subtract(TWIN, NOPE))
    assert np.allclose(choice.columns["M"], TWIN) and np.allclose(choice.columns["N"], NOPE)
    assert choice.kept_share[[1, 7]].min() > 0.99 and choice.equivalents == []
    # The most expensive swaps are other layers, and this is what most policies go by.
    assert chosen(measurer, "kl").layers == [0, 1]


def test_positions_are_measured_only_if_wanted_or_needed():
    for policy, wanted, measured in (("kl", True, True), ("kl", False, False), ("position", False, True)):
        measurer = SyntheticMeasurer(TWIN, NOPE)
        choice = chosen(measurer, policy, measure_positions=wanted)
        assert ("N" in choice.columns) == measured == ("kept 3" in measurer.names)


def test_greedy_search_sees_interactions():
    # Layers 0 and 1 are worth most one by one, but do the same: with one of them kept, the other is worth nothing.
    joint = {(0, 1): 0.5, (0, 1, 2): 0.5, (0, 1, 3): 0.5}
    measurer = SyntheticMeasurer([0.6, 0.5, 0.3, 0.1], joint=joint, noise=0.01)
    assert chosen(measurer, "position", exchange=0).layers == [0, 1]
    choice = chosen(measurer, "greedy")
    assert choice.layers == [0, 2] and [step["added"] for step in choice.rounds] == [0, 2]
    assert np.allclose(choice.scores[[0, 2, 1, 3]], [0.6, 0.3, 0.0, 0.1])
    assert choice.kept_share[0] == choice.kept_share[2] == 1 and choice.equivalents == []
    assert choice.rounds[1]["divergence"] == pytest.approx(0.6)


def test_greedy_names_what_it_cannot_tell_apart():
    choice = chosen(SyntheticMeasurer([0.6, 0.3, 0.3, 0.0], noise=0.05), "greedy")
    assert 0 in choice.layers and len(choice.equivalents) == 1 and set(choice.equivalents[0]) == {1, 2}
    assert 0.2 < choice.kept_share[1] < 0.8 and 0.2 < choice.kept_share[2] < 0.8


def test_single_layer_policy_keeps_the_student_with_the_least_loss():
    choice = chosen(SyntheticMeasurer(TWIN, NOPE, noise=0.01), "single-layer")
    assert choice.layers == [1, 7]
    # Below the teacher by the twins of all other layers and the positions of this one.
    assert np.allclose(choice.scores, np.subtract(TWIN, NOPE) - sum(TWIN))


def test_policies_on_loss_and_recall():
    recall = [0.05, 0.4, 0.05, 0.0, 0.05, 0.0, 1.0, 0.0]
    loss = [0.4, 0.1, 0.0001, 0.01, 0.0002, 0.02, 0.05, 0.03]
    measurer = SyntheticMeasurer(loss, recall=recall, silent=[0, 0, 3, 0, 0, 0, 0, 2], noise=0.01)
    assert chosen(measurer, "lm-ppl").layers == [2, 7]
    assert np.allclose(chosen(measurer, "lm-ppl").scores, [0, 0, 3, 0, 0, 0, 0, 2])
    assert chosen(measurer, "recall-drop").layers == [1, 6]
    assert np.allclose(chosen(measurer, "recall-drop").scores, np.round(np.multiply(recall, 60)) / 60)
    assert chosen(measurer, "difference").layers == [1, 6]
    assert chosen(measurer, "ratio", keep=1).layers == [6]
    # The published ratio keeps layers without any effect, since it divides by what is lost in language, which is zero.
    published = chosen(measurer, "halo")
    assert published.layers == [2, 4]
    assert any("drops layer 6, whose swap leaves 0.00 of recall" in warning for warning in published.warnings)
    assert chosen(measurer, "difference").warnings == []


def test_difference_follows_its_formula_and_weight():
    recall, loss = [0.5, 0.2, 0.0], [0.4, 0.1, 0.2]
    measurer = SyntheticMeasurer(loss, recall=recall)
    for weight in (0.0, 1.0, 3.0):
        expected = np.subtract(recall, weight * (1 - np.exp(np.negative(loss))))
        assert np.allclose(chosen(measurer, "difference", 1, language_weight=weight).scores, expected)


def test_ratio_floor_is_twice_the_largest_error():
    recall, loss = [0.05, 1.0], [0.0001, 0.05]
    choice = chosen(SyntheticMeasurer(loss, recall=recall, noise=0.01), "ratio", 1)
    error, drop = choice.columns["language_drop_error"].max(), choice.columns["language_drop"]
    assert drop[0] < 2 * error < drop[1]
    assert np.allclose(choice.scores, [0.05 / (2 * error), 1.0 / drop[1]])


def test_published_score_depends_on_eps_and_clip():
    recall, language = np.array([0.80, 0.70, 0.60]), np.array([0.57, 0.569, 0.50])
    assert np.allclose(published_score(recall, language, 1e-3), [0, 0.1 / 0.002, 0.2 / 0.071])
    # For the layer with the lowest loss the denominator is eps.
    recall, language = np.array([0.79, 0.70, 0.60, 0.80]), np.append(language, 0.4)
    assert top_layers(published_score(recall, language, 1e-10), 1) == [0]
    assert top_layers(published_score(recall, language, 1e-1), 1) == [2]
    clipped = published_score(recall, language, 1e-6, 50.0)
    assert clipped.max() == 50 and np.array_equal(clipped, np.minimum(published_score(recall, language, 1e-6), 50.0))


def test_published_policy_uses_eps_and_clip_of_the_settings():
    measurer = SyntheticMeasurer([0.4, 0.1, 0.2], recall=[0.5, 0.1, 0.3])
    language = np.exp(-(np.random.default_rng(7).normal(3, 1, CHUNKS).mean() + np.array([0.4, 0.1, 0.2])))
    for eps, clip in ((1e-6, None), (0.1, None), (1e-10, 50.0)):
        choice = chosen(measurer, "halo", 1, eps=eps, clip=clip)
        assert np.allclose(choice.scores, published_score(1 - np.array([0.5, 0.1, 0.3]), language, eps, clip))
    assert (SelectSettings().eps, SelectSettings().clip) == (1e-6, None)


def test_joint_keeps_the_largest_gates():
    gates = [[0.1, 0.9, 0.2, 0.7], [0.2, 0.8, 0.6, 0.5], [0.0, 1.0, 0.1, 0.9]]
    choice = chosen(SyntheticMeasurer(TWIN[:4], NOPE[:4], gates=gates), "joint", joint_seeds=3)
    assert choice.layers == [1, 3] and np.allclose(choice.scores, np.mean(gates, 0))
    assert np.allclose(choice.score_error, np.std(gates, 0, ddof=1) / np.sqrt(3))
    assert np.allclose(choice.kept_share, [0, 1, 1 / 3, 2 / 3])
    assert np.allclose(choice.columns["N"], NOPE[:4])
    assert choice.equivalents == [(3, 2)]  # 0.7 - 0.3 = 0.4 with an error of 0.26
    once = chosen(SyntheticMeasurer(TWIN[:4], gates=gates), "joint")
    assert once.layers == [1, 3] and once.score_error is None and once.kept_share is None and once.equivalents == []


def test_spaced_and_given_layers_measure_nothing():
    assert spaced_layers(28, 7) == [0, 4, 8, 12, 16, 20, 24]
    assert spaced_layers(28, 7, last=True) == [3, 7, 11, 15, 19, 23, 27]
    assert spaced_layers(8, 3) == [0, 2, 5] and spaced_layers(8, 3, last=True) == [1, 4, 7]
    measurer = SyntheticMeasurer(TWIN)
    assert chosen(measurer, "uniform").layers == [0, 4] and chosen(measurer, "uniform-late").layers == [3, 7]
    given = choose(measurer, SelectSettings(layers=[5, 2, 5]))
    assert given.layers == [2, 5] and given.scores is None and measurer.names == []
    with pytest.raises(HaloError, match=r"select.layers: must be layers below 8, got \[8\]"):
        choose(measurer, SelectSettings(layers=[8]))


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "given"])
def test_cost_is_what_is_measured(policy):
    """All of it, and no exchange succeeds here, so that no further round is measured."""
    measurer = SyntheticMeasurer(TWIN, NOPE, gates=[TWIN])
    settings = SelectSettings(policy=policy, keep=2, bootstrap=10)
    choose(measurer, settings)
    runs = count_runs(settings, 8)
    assert len(measurer.names) == runs.teachers + runs.students
    assert sum(name.startswith("student") for name in measurer.names) == runs.students
    assert runs.training_tokens == (300 * 32 * 2048 if policy == "joint" else 0)
    assert runs.further == (2 * 6 if policy == "position" else 0)


def test_exchange_improves_a_choice_that_scores_get_wrong():
    # By scores 0 and 1 are best. Together they are worse than either with 3, and 2 is in the way as well.
    joint = {(0, 1): 1.0, (0, 2): 1.5, (1, 2): 1.5}
    measurer = SyntheticMeasurer([0.6, 0.5, 0.4, 0.3, 0.0], joint=joint, noise=0.01)
    choice = chosen(measurer, "position", exchange=2, exchange_rounds=5)
    assert choice.layers == [0, 3] == chosen(measurer, "kl", exchange=2).layers
    (accepted,) = [step for step in choice.exchanges if step["accepted"]]
    assert (accepted["round"], accepted["removed"], accepted["added"]) == (1, 1, 3)
    assert accepted["gain"] == pytest.approx(0.8) and accepted["gain"] > 2 * accepted["error"]
    assert max(step["round"] for step in choice.exchanges) == 2  # the second finds nothing better
    assert chosen(measurer, "position", exchange=0).layers == [0, 1]


def test_exchange_ends():
    rng = np.random.default_rng(0)
    pairs = {(i, j): float(rng.uniform(0, 2)) for i in range(8) for j in range(i + 1, 8)}
    measurer = SyntheticMeasurer([0.1 * i for i in range(8)], joint=pairs)
    choice = chosen(measurer, "position", exchange=6, exchange_rounds=100)
    accepted = [step for step in choice.exchanges if step["accepted"]]
    assert accepted and all(step["gain"] > 0 for step in accepted)
    best = measurer.measure([student(choice.layers, 8)])[0].means().divergence
    others = [sorted({*choice.layers, new} - {old}) for old in choice.layers for new in range(8)]
    assert all(best <= r.means().divergence for r in measurer.measure([student(x, 8) for x in others if len(x) == 2]))
    once = chosen(measurer, "position", exchange=6, exchange_rounds=1)
    assert len([step for step in once.exchanges if step["accepted"]]) == 1


def test_exchange_needs_more_than_noise():
    # A difference of 0.001 with an error of 0.003 is no reason to leave the score's choice.
    measurer = SyntheticMeasurer([0.5, 0.3005, 0.3, 0.0], joint={(0, 1): 0.001}, noise=0.02)
    choice = chosen(measurer, "position")
    assert choice.layers == [0, 1] and not any(step["accepted"] for step in choice.exchanges)
    assert choice.equivalents == [(1, 2)]


def test_students_decide_what_is_equivalent_where_they_were_compared():
    # Scores cannot tell 1 from 2, students can.
    measurer = SyntheticMeasurer([0.5, 0.3005, 0.3, 0.0], joint={(0, 2): 0.4}, noise=0.02)
    assert chosen(measurer, "position", exchange=0).equivalents == [(1, 2)]
    assert chosen(measurer, "position").equivalents == []


def test_exchange_with_all_layers_kept():
    choice = chosen(SyntheticMeasurer([0.5, 0.3]), "position", keep=2)
    assert choice.layers == [0, 1] and choice.exchanges == []


def test_equal_layers_are_equivalent_and_different_ones_are_not():
    measurer = SyntheticMeasurer([0.5, 0.3, 0.3, 0.1], noise=0.05)
    choice = chosen(measurer, "kl")
    assert 0 in choice.layers and choice.layers[1] in (1, 2)
    assert [set(pair) for pair in choice.equivalents] == [{1, 2}]
    kept = choice.layers[1]
    assert equivalence_lines(choice.equivalents) == [f"layers 1 and 2 are equivalent within the error (kept: {kept})"]
    assert choice.kept_share.sum() == pytest.approx(2) and 0.2 < choice.kept_share[1] < 0.8
    assert choice.kept_share[0] > 0.99


def test_equivalence_is_by_the_difference():
    # Scores that move together differ surely, however large their own errors are.
    rng = np.random.default_rng(0)
    common = rng.normal(0, 1, 500)
    drawn = np.stack([0.1 + common, common, 0.1 + rng.normal(0, 1, 500)])
    assert equivalent_pairs(np.array([0.1, 0.0, 0.1]), drawn, [0]) == [(0, 2)]
    # As far apart as 2.2 standard errors of the difference, and 1.8.
    for gap, expected in ((2.2, []), (1.8, [(0, 1)])):
        drawn = np.stack([np.full(20_000, gap), rng.normal(0, 1, 20_000)])
        assert equivalent_pairs(np.array([gap, 0.0]), drawn, [0]) == expected
    # A ratio whose denominator is almost zero in some resamples has no useful standard error.
    drawn = np.stack([np.where(np.arange(500) % 5, 10.0, 1e6), np.ones(500)])
    assert equivalent_pairs(np.array([10.0, 1.0]), drawn, [0]) == []


def test_lines_group_layers():
    lines = equivalence_lines([(3, 6), (7, 6), (7, 5), (3, 5), (1, 2)])
    assert lines == [
        "layers 1 and 2 are equivalent within the error (kept: 1)",
        "layers 3, 5, 6 and 7 are equivalent within the error (kept: 3 and 7)",
    ]
    assert equivalence_lines([]) == []


def test_errors_are_those_of_paired_differences():
    measurer = SyntheticMeasurer([0.2, 0.3], recall=[0.0, 0.5], noise=0.01)
    teacher, *twins = measurer.measure([unchanged(2), one_layer("twin", 0, 2), one_layer("twin", 1, 2)])
    found = drops(Result.stack(twins), Result.stack([teacher]))
    assert np.allclose(found["loss_rise"], [0.2, 0.3]) and found["recall_drop"][1] == 0.5
    # The chunks differ by 1 nat; the differences on them by 0.01 * sqrt(2).
    assert (found["loss_rise_error"] < 0.01 / np.sqrt(CHUNKS) * 2).all()
    assert np.allclose(found["language_drop"], 1 - np.exp([-0.2, -0.3]))
    assert found["recall_drop_error"][0] == 0
    assert found["recall_drop_error"][1] == pytest.approx(0.5 / np.sqrt(EPISODES - 1))
    gap, error = divergence_and_error(twins[1], twins[0])
    text, episodes = (getattr(twins[1], name) - getattr(twins[0], name) for name in NAMES)
    spread = np.hypot(text.std(ddof=1) / np.sqrt(CHUNKS), episodes.std(ddof=1) / np.sqrt(EPISODES)) / 2
    assert gap == pytest.approx(0.1) and error == pytest.approx(spread)


NAMES = ("text_divergence", "episode_divergence")


def test_bootstrap_draws_samples_with_replacement():
    (result,) = SyntheticMeasurer([0.3], noise=1.0).measure([one_layer("twin", 0, 1)])
    resamples = Resamples.draw(result, 4000, seed=0)
    for weights, count in ((resamples.text, CHUNKS), (resamples.episodes, EPISODES)):
        drawn = weights * count
        assert np.allclose(weights.sum(1), 1) and np.allclose(drawn, np.round(drawn)) and drawn.max() > 1
    # As if the samples were drawn by index.
    indices = np.repeat(np.arange(CHUNKS), np.round(resamples.text[0] * CHUNKS).astype(int))
    means = Result.stack([result]).means(resamples)
    assert means.loss[0, 0] == pytest.approx(result.text_loss[indices].mean())
    error = divergence_and_error(result)[1]
    assert means.divergence.std(ddof=1) == pytest.approx(float(error), rel=0.05)


def test_same_seed_same_choice():
    first, second = (chosen(SyntheticMeasurer(TWIN, NOPE, noise=0.3), "position") for _ in range(2))
    assert np.array_equal(first.kept_share, second.kept_share) and first.equivalents == second.equivalents
    other = SyntheticMeasurer(TWIN, NOPE, noise=0.3)
    other.seed = 1
    assert not np.array_equal(chosen(other, "position").kept_share, first.kept_share)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"Result: recall must have shape \[3\], got \[4\]"):
        Result(np.ones(2), np.ones(2), np.ones(3), np.ones(4))


def test_score_functions_take_means_and_resamples_alike():
    measurer = SyntheticMeasurer(TWIN, NOPE, recall=[0.1 * i for i in range(8)], noise=0.1)
    teacher = Result.stack(measurer.measure([unchanged(8)]))
    results = {
        form: Result.stack(measurer.measure([one_layer(form, i, 8) for i in range(8)]))
        for form in ("twin", "kept", "silent")
    }
    results["student"] = Result.stack(measurer.measure([student([i], 8) for i in range(8)]))
    whole = Resamples(np.full((3, CHUNKS), 1 / CHUNKS), np.full((3, EPISODES), 1 / EPISODES))
    for policy in POLICIES.values():
        if not hasattr(policy, "score"):
            continue
        plain, drawn = (
            policy.score(
                scores.Measured(teacher.means(r), {form: x.means(r) for form, x in results.items()}, 0.01),
                SelectSettings(clip=50.0),
            )
            for r in (None, whole)
        )
        assert plain.shape == (8,) and drawn.shape == (8, 3) and np.allclose(drawn, plain[:, None])


@pytest.mark.parametrize(
    ("select", "message"),
    [
        ({"score": "paper"}, "select: score is now select.policy; must be policy: halo, got score: paper"),
        ({"score": "even"}, "select: score is now select.policy; must be policy: uniform, got score: even"),
        ({"score": "difference"}, "select: score is now select.policy; must be policy: difference, got score: diff"),
        ({"score": "best"}, "select: score is now select.policy; must be one of position, halo, recall-drop, "),
        ({"policy": "best"}, "select.policy: must be 'position', 'halo', "),
        ({"policy": "given"}, "select: layers must be given with policy given, got policy given and layers None"),
        ({"policy": "kl", "layers": [1]}, "select: layers must come with policy given, got policy kl and layers [1]"),
        ({"policy": "uniform", "exchange": 2}, "select: exchange must be 0 or null for policy uniform, got 2"),
        ({"joint_batch": 6, "joint_micro_batch": 4}, "select: joint_micro_batch must divide joint_batch (6), got 4"),
    ],
)
def test_mistakes_are_one_line(select, message):
    with pytest.raises(HaloError) as error:
        make_config({"teacher": "t", "out": "o", "data": {"source": "s"}, "select": select})
    assert str(error.value).startswith(f"config: {message}") and "\n" not in str(error.value)
