"""A measurer whose results are given by formulas, so that the right choice of layers is known."""

import hashlib

import numpy as np

from halo.selection.results import Result

EPISODES, CHUNKS = 60, 40


class SyntheticMeasurer:
    """Costs of layers add up; samples differ by a common part, and variants by independent noise around their means.

    Args:
        twin: What the twin costs in each layer, in nats of divergence and of loss.
        kept: What attention without positions costs; zero by default.
        recall: What the twin costs of recall in each layer; zero by default.
        silent: By how much the loss rises without the layer; zero by default.
        loss: What the twin costs in next-token loss, if not the same as in divergence.
        joint: Extra divergence of students by their kept layers.
        noise: Standard deviation over samples.
        gates: What `train_gates` returns for each seed.
    """

    seed = 0

    def __init__(self, twin, kept=None, recall=None, silent=None, loss=None, joint=None, noise=0.0, gates=None):
        self.num_layers = len(twin)
        zeros = [0.0] * len(twin)
        self.costs = {"twin": twin, "kept": kept or zeros, "silent": zeros, "attention": zeros}
        self.losses = {"twin": loss or twin, "kept": kept or zeros, "silent": silent or zeros, "attention": zeros}
        self.recall, self.joint, self.noise, self.gates = recall or zeros, joint or {}, noise, gates
        self.names = []

    def measure(self, variants):
        self.names += [variant.name for variant in variants if variant.name not in self.names]
        return [self.result(variant) for variant in variants]

    def train_gates(self, seed):
        return np.array(self.gates[seed], dtype=float)

    def result(self, variant):
        kept = tuple(i for i, form in enumerate(variant.forms) if form == "kept") if variant.is_student else None
        cost = sum(self.costs[form][i] for i, form in enumerate(variant.forms)) + self.joint.get(kept, 0.0)
        loss = sum(self.losses[form][i] for i, form in enumerate(variant.forms)) + self.joint.get(kept, 0.0)
        lost = min(1.0, sum(self.recall[i] for i, form in enumerate(variant.forms) if form == "twin"))
        rng = np.random.default_rng(int(hashlib.sha256(variant.name.encode()).hexdigest()[:8], 16))
        common = np.random.default_rng(7).normal(3, 1, CHUNKS)

        def jitter(count):
            values = rng.normal(0, self.noise, count)
            return values - values.mean()

        failed = rng.permutation(EPISODES) < round(lost * EPISODES)
        return Result(
            text_divergence=cost + jitter(CHUNKS),
            text_loss=common + loss + jitter(CHUNKS),
            episode_divergence=cost + jitter(EPISODES),
            recall=1.0 - failed,
        )
