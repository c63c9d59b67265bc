"""Scores rank layers as defined, and a choice that the samples do not support is reported as unstable."""

import numpy as np
import pytest

from halo.selection import Measurements, ScoreRule, choose, even_layers, measure_drops, paper_scores, scores, top_layers

EPISODES, CHUNKS = 60, 40


def measurements(recall_drops, loss_rises, noise=0.01, seed=0):
    """Return measurements with these mean drops and independent noise per layer around the teacher's scores."""
    rng = np.random.default_rng(seed)
    recall_drops, loss_rises = np.array(recall_drops, float), np.array(loss_rises, float)
    layers = len(recall_drops)
    recall = np.ones(EPISODES)
    failed = (
        rng.permuted(np.tile(np.arange(EPISODES), (layers, 1)), axis=1) < np.round(recall_drops * EPISODES)[:, None]
    )
    loss = rng.normal(3, 1, CHUNKS)
    jitter = rng.normal(0, noise, (layers, CHUNKS))
    jitter -= jitter.mean(1, keepdims=True)
    return Measurements(recall, loss, 1.0 - failed, loss + loss_rises[:, None] + jitter)


# Swapping layer 2 changes almost nothing; only layer 6 matters for recall, at a small cost in language modelling.
FRAGILE = measurements(
    recall_drops=[0.05, 0.4, 0.05, 0.0, 0.05, 0.0, 1.0, 0.0],
    loss_rises=[0.4, 0.1, 0.0001, 0.01, 0.0002, 0.02, 0.05, 0.03],
)


def test_published_ratio_keeps_layers_without_effect_and_the_others_do_not():
    assert top_layers(scores(FRAGILE, ScoreRule("paper")), 2) == [2, 4]
    assert top_layers(scores(FRAGILE, ScoreRule("difference")), 2) == [1, 6]
    assert top_layers(scores(FRAGILE, ScoreRule("ratio")), 1) == [6]


def test_default_rule_is_the_robust_one():
    assert ScoreRule().name == "difference"


def test_published_choice_comes_with_a_warning():
    plan = choose(FRAGILE, 2, ScoreRule("paper"), resamples=100, stable_share=0.8, seed=0)
    assert any("drops layer 6, whose swap costs 1.00 of recall" in warning for warning in plan.warnings)
    robust = choose(FRAGILE, 2, ScoreRule(), resamples=100, stable_share=0.8, seed=0)
    assert robust.layers == [1, 6] and robust.warnings == []
    assert robust.kept_share[[1, 6]].min() > 0.95


def test_choice_between_equal_layers_is_called_unstable():
    equal = measurements([0.5, 0.5, 0.5, 0.0], [0.1, 0.1, 0.1, 0.1], noise=0.05)
    plan = choose(equal, 1, ScoreRule(), resamples=200, stable_share=0.8, seed=0)
    assert plan.kept_share.max() < 0.8 and abs(plan.kept_share.sum() - 1) < 1e-9
    assert "not stable" in plan.warnings[0] and "next in line" in plan.warnings[0]


def test_paired_errors_are_those_of_the_differences():
    drops = measure_drops(measurements([0.0, 0.5], [0.2, 0.3], noise=0.01))
    assert np.allclose(drops.loss_rise, [0.2, 0.3]) and drops.recall_drop[1] == 0.5
    # The chunks differ by 1 nat; the differences on them by 0.01.
    assert (drops.loss_error < 0.01 / np.sqrt(CHUNKS) * 1.5).all()
    assert np.allclose(drops.language_drop, 1 - np.exp([-0.2, -0.3]))
    assert drops.recall_error[0] == 0 and drops.recall_error[1] == pytest.approx(0.5 / np.sqrt(EPISODES - 1))


def test_difference_follows_its_formula_and_weight():
    drops = measure_drops(FRAGILE)
    for weight in (0.0, 1.0, 3.0):
        expected = drops.recall_drop - weight * drops.language_drop
        assert np.allclose(scores(FRAGILE, ScoreRule("difference", language_weight=weight)), expected)


def test_ratio_floor_is_twice_the_largest_error():
    drops = measure_drops(FRAGILE)
    floor = 2 * drops.language_error.max()
    assert drops.language_drop[2] < floor < drops.language_drop[6]
    values = scores(FRAGILE, ScoreRule("ratio"))
    assert values[2] == pytest.approx(drops.recall_drop[2] / floor)
    assert values[6] == pytest.approx(drops.recall_drop[6] / drops.language_drop[6])


def test_published_form_depends_on_eps():
    recall, language = np.array([0.80, 0.70, 0.60]), np.array([0.57, 0.569, 0.50])
    assert np.allclose(paper_scores(recall, language, 1e-3), [0, 0.1 / 0.002, 0.2 / 0.071])
    # For the layer with the lowest loss the denominator is eps.
    recall[0] = 0.79
    recall = np.append(recall, 0.80)
    language = np.append(language, 0.4)
    assert top_layers(paper_scores(recall, language, 1e-10), 1) == [0]
    assert top_layers(paper_scores(recall, language, 1e-1), 1) == [2]


def test_clip_makes_large_scores_equal():
    recall, language = np.array([0.80, 0.70, 0.60, 0.50]), np.array([0.57, 0.569, 0.5695, 0.50])
    assert np.allclose(paper_scores(recall, language, 1e-6), [0, 0.1 / 0.001001, 0.2 / 0.000501, 0.3 / 0.070001])
    assert np.allclose(paper_scores(recall, language, 1e-6, 50.0), [0, 50, 50, 0.3 / 0.070001])
    assert ScoreRule().clip is None
    clipped = scores(FRAGILE, ScoreRule("paper", clip=50.0))
    assert np.array_equal(clipped, np.minimum(scores(FRAGILE, ScoreRule("paper")), 50.0)) and clipped.max() == 50


def test_unknown_rule_and_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="rule must be difference, ratio or paper, got best"):
        scores(FRAGILE, ScoreRule("best"))
    with pytest.raises(ValueError, match="swapped_loss must have shape"):
        Measurements(np.ones(3), np.ones(4), np.ones((2, 3)), np.ones((2, 5)))


def test_even_layers():
    assert even_layers(28, 7) == [0, 4, 8, 12, 16, 20, 24]
    assert even_layers(8, 2) == [0, 4]
    assert even_layers(8, 3) == [0, 2, 5]


def test_same_seed_same_plan():
    first, second = (choose(FRAGILE, 2, ScoreRule(), 50, 0.8, seed=4) for _ in range(2))
    assert np.array_equal(first.kept_share, second.kept_share)
