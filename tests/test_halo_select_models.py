"""Layer selection on a teacher of three layers: variants, measurements, journal, gates, and the stage."""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from halo_tiny import LAYERS, config_tree, tiny_teacher, tiny_tokenizer, write_inputs
from torch.nn import functional as F

from halo import models
from halo.compute import Compute
from halo.config import make_config
from halo.data import Batch, Corpus, DataSettings
from halo.evaluation.needle import recall_per_episode
from halo.journal import Journal
from halo.losses import IGNORE, kl_divergence, next_token_labels, token_divergences, token_losses
from halo.pipeline import Pipeline
from halo.selection.joint import GateTraining, train_gates
from halo.selection.measurer import ModelMeasurer, Samples, Unmeasured
from halo.selection.policies import POLICIES, choose
from halo.selection.report import selection_section
from halo.selection.settings import UNMEASURED, SelectSettings, gate_settings
from halo.selection.variants import TwinAttention, arranged, one_layer, student, unchanged
from halo.settings import TrainingSettings
from halo.trainer import Run, train
from hypenet import from_teacher

SAMPLES = {"recall_samples": 3, "recall_length": 160, "language_samples": 5, "language_length": 32, "batch": 2}
SETTINGS = SelectSettings(keep=1, bootstrap=20, **SAMPLES)
CPU = Compute(torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("inputs")
    write_inputs(directory)
    return directory


@pytest.fixture(scope="module")
def corpus(inputs):
    return Corpus(DataSettings(source=str(inputs / "text"), held_out=0.3, needle_ratio=0.3), tiny_tokenizer())


@pytest.fixture(scope="module")
def teacher(corpus):
    return tiny_teacher(tokenizer=corpus.tokenizer).requires_grad_(False)


@pytest.fixture(scope="module")
def twins(teacher):
    return models.make_twins(teacher, "lightning").requires_grad_(False)


@pytest.fixture
def measurer(teacher, twins, corpus, tmp_path):
    return make_measurer(teacher, twins, corpus, Journal(tmp_path, {}))


def make_measurer(teacher, twins, corpus, journal, settings=SETTINGS, **options):
    return ModelMeasurer(teacher, twins, Samples.draw(corpus, settings), settings, journal, 0, **options)


def hidden(model, ids):
    return models.hidden_states(model, Batch(ids, torch.zeros_like(ids, dtype=torch.int32)))


def test_divergence_and_loss_of_each_token():
    generator = torch.Generator().manual_seed(0)
    h, t, w, u = (
        torch.randn(s, generator=generator, dtype=torch.float64) for s in ((2, 7, 8), (2, 7, 5), (30, 8), (30, 5))
    )
    labels = torch.randint(30, (2, 7), generator=generator)
    labels[0, 3] = IGNORE
    log_q, log_p = (h @ w.T).log_softmax(-1), (t @ u.T).log_softmax(-1)
    expected = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    for chunk in (3, 14, 512):
        divergences, losses = token_divergences(h, w, t, u, labels, chunk)
        torch.testing.assert_close(divergences, expected)
        torch.testing.assert_close(losses, F.cross_entropy(log_q.mT, labels, reduction="none"))
        assert divergences.mean().item() == pytest.approx(kl_divergence(h, w, t, u).item())
    assert token_divergences(h, w, h, w, labels)[0].abs().max() == 0
    with pytest.raises(ValueError, match="token_divergences: labels must be from 0 to 29"):
        token_divergences(h, w, t, u, labels + 30)


@pytest.mark.parametrize("rotary", [False, True])
def test_student_variant_is_the_student(teacher, twins, rotary):
    ids = torch.arange(40)[None] % teacher.config.vocab_size
    for kept in ([], [1], [0, 2]):
        own = copy.deepcopy(twins)
        expected = models.make_student(teacher, own, kept, "lightning", "open", attn_use_rope=rotary).eval()
        with torch.no_grad(), arranged(teacher, list(twins), student(kept, LAYERS), rotary):
            torch.testing.assert_close(hidden(teacher, ids), hidden(expected, ids), atol=1e-5, rtol=1e-5)


def test_a_layer_without_positions_does_not_see_the_order(teacher, twins):
    ids = torch.tensor([[5, 6, 7, 8, 9], [7, 5, 8, 6, 9]])
    attention = teacher.model.layers[0].self_attn
    positions = teacher.model.rotary_emb(torch.zeros(1, 5, 32), torch.arange(5)[None])
    x = teacher.model.embed_tokens(ids)
    with torch.no_grad(), arranged(teacher, list(twins), one_layer("kept", 0, LAYERS)):
        module = teacher.model.layers[0].self_attn
        y = module(hidden_states=x, position_embeddings=positions, attention_mask=None)[0]
        torch.testing.assert_close(y[0, -1], y[1, -1])
    assert teacher.model.layers[0].self_attn is attention
    rotated = attention(hidden_states=x, position_embeddings=positions, attention_mask=None)[0]
    assert not torch.allclose(rotated[0, -1], rotated[1, -1], atol=1e-4)


def test_silent_layer_adds_nothing(teacher, twins):
    ids = torch.arange(20)[None]
    weight = teacher.model.layers[1].self_attn.o_proj.weight
    with torch.no_grad():
        with arranged(teacher, list(twins), one_layer("silent", 1, LAYERS)):
            found = hidden(teacher, ids)
        kept = weight.clone()
        weight.zero_()
        expected = hidden(teacher, ids)
        weight.copy_(kept)
    assert torch.equal(found, expected)


def test_teacher_is_put_back_after_an_error(teacher, twins):
    before = [layer.self_attn for layer in teacher.model.layers]
    with pytest.raises(RuntimeError, match="stop"), arranged(teacher, list(twins), student([1], LAYERS)):
        raise RuntimeError("stop")
    assert [layer.self_attn for layer in teacher.model.layers] == before


def test_measurements_are_those_of_the_variant(measurer, teacher, twins, corpus):
    samples = measurer.samples
    assert samples.text.shape == (5, 32) and samples.episodes.shape == (3, 160)
    variants = [unchanged(LAYERS), one_layer("twin", 1, LAYERS), student([2], LAYERS)]
    for variant, result in zip(variants, measurer.measure(variants), strict=True):
        with torch.no_grad():
            bases = [hidden(teacher, ids) for ids in (samples.text, samples.episodes)]
        with torch.no_grad(), arranged(teacher, list(twins), variant):
            head = teacher.lm_head.weight
            losses = token_losses(hidden(teacher, samples.text), head, next_token_labels(samples.text)).sum(-1) / 31
            found = [hidden(teacher, ids) for ids in (samples.text, samples.episodes)]
            recall = recall_per_episode(teacher, corpus.task("choose"), 160, 3, corpus.seed)
        np.testing.assert_allclose(result.text_loss, losses.numpy(), rtol=1e-5)
        assert np.array_equal(result.recall, recall)
        for values, h, base in zip((result.text_divergence, result.episode_divergence), found, bases, strict=True):
            expected = [kl_divergence(h[i], head, base[i], head).item() for i in range(len(h))]
            np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-7)
    assert measurer.measure(variants[:1])[0].text_divergence.max() == 0


@pytest.mark.parametrize("gib", [0.0, 6 * 160 * 32 * 4 / 2**30 / 2, 1.0])
def test_hidden_states_that_do_not_fit_are_recomputed(teacher, twins, corpus, tmp_path, gib):
    settings = SETTINGS.model_copy(update={"cache_gib": gib})
    measurer = make_measurer(teacher, twins, corpus, Journal(tmp_path / "a", {}), settings)
    whole = make_measurer(teacher, twins, corpus, Journal(tmp_path / "b", {}))
    variants = [one_layer("twin", i, LAYERS) for i in range(2)]
    pairs = zip(measurer.measure(variants), whole.measure(variants), strict=True)
    assert all(a.plain() == b.plain() for a, b in pairs)
    assert 0 <= len(measurer._states) <= len(whole._states) == 5
    assert (len(measurer._states) == 5) == (gib == 1.0) and (len(measurer._states) == 0) == (gib == 0)


def test_every_variant_is_measured_once_and_survives_an_interruption(teacher, twins, corpus, tmp_path):
    settings = SETTINGS.model_copy(update={"policy": "position", "exchange_rounds": 2})
    whole = make_measurer(teacher, twins, corpus, Journal(tmp_path / "whole", {}), settings)
    expected = choose(whole, settings)
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines(keepends=True)
    names = [json.loads(line)["key"] for line in lines[1:]]
    assert len(names) == len(set(names)) == len(whole.measured)
    (tmp_path / "part").mkdir()
    # The settings and three variants; the fourth is truncated, as by a kill.
    (tmp_path / "part" / "metrics.jsonl").write_text("".join(lines[:4]) + lines[4][:30])
    done = []
    part = make_measurer(
        teacher, twins, corpus, Journal(tmp_path / "part", {}), settings, on_progress=lambda n, name: done.append(n)
    )
    found = choose(part, settings)
    assert (tmp_path / "part" / "metrics.jsonl").read_text() == "".join(lines)
    assert found.layers == expected.layers and np.array_equal(found.scores, expected.scores)
    assert found.exchanges == expected.exchanges and np.array_equal(found.kept_share, expected.kept_share)
    assert done == sorted(set(done)) and done[-1] == len(names)


def test_two_processes_share_the_variants(teacher, twins, corpus, tmp_path):
    """Rank 1 measures its half, rank 0 the other, and both choose the same."""
    settings = SETTINGS.model_copy(update={"exchange": 0})
    alone = choose(make_measurer(teacher, twins, corpus, Journal(tmp_path / "alone", {}), settings), settings)
    other = SimpleNamespace(rank=1, world=2, gather=lambda own: [own])
    with pytest.raises(KeyError):  # the other process has measured nothing yet
        choose(make_measurer(teacher, twins, corpus, Journal(tmp_path / "two", {}, other), settings), settings)
    half = [json.loads(line) for line in (tmp_path / "two" / "metrics-1.jsonl").read_text().splitlines()][1:]
    assert [line["key"] for line in half] == ["twin 0", "twin 2", "kept 1"]
    pieces = {line["key"]: line["value"] for line in half}
    main = SimpleNamespace(rank=0, world=2, gather=lambda own: [own, pieces])
    shared = choose(make_measurer(teacher, twins, corpus, Journal(tmp_path / "two", {}, main), settings), settings)
    assert shared.layers == alone.layers and np.array_equal(shared.scores, alone.scores)
    lines = (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()[1:]
    assert [json.loads(line)["key"] for line in lines] == ["teacher", "twin 1", "kept 0", "kept 2"]


@pytest.mark.parametrize("policy", [name for name in POLICIES if name not in (*UNMEASURED, "joint")])
def test_policies_choose_on_a_model(teacher, twins, corpus, tmp_path_factory, policy):
    directory = tmp_path_factory.getbasetemp() / "shared journal"  # what one has measured, the next one reuses
    settings = SETTINGS.model_copy(update={"policy": policy})
    choice = choose(make_measurer(teacher, twins, corpus, Journal(directory, {}), settings), settings)
    assert len(choice.layers) == 1 and len(choice.scores) == LAYERS and np.isfinite(choice.scores).all()
    assert {"N", "N_error"} <= choice.columns.keys() and choice.kept_share.min() >= 0


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_twin_in_the_teacher_refuses_a_cache(name):
    with pytest.raises(NotImplementedError, match="TwinAttention: the cache must be off"):
        TwinAttention(torch.nn.Identity())(torch.zeros(1, 2, 4), (torch.ones(2), torch.ones(2)), **{name: object()})


def test_nothing_to_measure_is_refused():
    with pytest.raises(ValueError, match="Unmeasured: variants must not be measured, got 1"):
        Unmeasured(3).measure([unchanged(3)])
    with pytest.raises(ValueError, match="gates must not be trained"):
        Unmeasured(3).train_gates(0)


def gate_training(teacher, twins, price=0.0, **settings):
    defaults = {"steps": 6, "batch": 4, "length": 24, "learning_rate": 0.3, "warmup": 0, "log_every": 1}
    return GateTraining(teacher, twins, TrainingSettings(**(defaults | settings)), price)


def random_batches(vocabulary):
    def source(start):
        step = start
        while True:
            ids = torch.randint(vocabulary, (4, 24), generator=torch.Generator().manual_seed(step))
            yield Batch(ids, torch.zeros_like(ids, dtype=torch.int32))
            step += 1

    return source


@pytest.mark.parametrize("rotary", [False, True])
def test_gates_of_zero_and_one_are_twins_and_attention(teacher, twins, rotary):
    training = gate_training(teacher, twins)
    training.rotary = rotary
    ids = torch.arange(30)[None]
    with torch.no_grad():
        training.gates.copy_(torch.tensor([-200.0, 200.0, -200.0]))
        batch = Batch(ids, torch.zeros_like(ids, dtype=torch.int32))
        with models.replaced(teacher, training.gated_layers(batch)):
            found = models.hidden_states(teacher, batch)
        with arranged(teacher, list(twins), student([1], LAYERS), rotary):
            expected = hidden(teacher, ids)
    torch.testing.assert_close(found, expected)


def test_gates_do_not_see_other_documents(teacher, twins):
    """Isolated documents are packed into one row, and each is what it is alone."""
    documents = torch.zeros(2, 24, dtype=torch.int32)
    documents[0, 10:] = 1
    batch = Batch(torch.arange(48).view(2, 24), documents)
    training = GateTraining(teacher, twins, TrainingSettings(steps=1, batch=2, learning_rate=1.0), 0.0, True)
    with torch.no_grad(), models.replaced(teacher, training.gated_layers(batch)):
        found = models.hidden_states(teacher, batch, isolate_documents=True)
    for row, part in ((0, slice(0, 10)), (0, slice(10, 24)), (1, slice(0, 24))):
        ids = batch.input_ids[row : row + 1, part]
        alone = Batch(ids, torch.zeros_like(ids, dtype=torch.int32))
        with torch.no_grad(), models.replaced(teacher, training.gated_layers(alone)):
            torch.testing.assert_close(models.hidden_states(teacher, alone)[0], found[row, part], atol=1e-5, rtol=1e-4)


def test_gradient_of_the_gates_is_that_of_the_loss(teacher, twins):
    batch = next(random_batches(teacher.config.vocab_size)(0))
    count = torch.tensor(float(batch.input_ids.numel()))
    training = gate_training(teacher, twins, price=0.6, steps=3)
    training.step = 1
    training.gates.data = torch.tensor([0.5, -1.0, 0.2])
    sums = training.accumulate(batch, count, 1.0)
    assert sums["attention"] == pytest.approx(training.gates.sigmoid().mean().item())
    assert sums["loss"].item() == pytest.approx(sums["divergence"].item() + 0.6 * 2 / 3 * sums["attention"].item())
    gradient, numeric, step = training.gates.grad.clone(), torch.zeros(LAYERS), 1e-2
    with torch.no_grad():
        for i in range(LAYERS):
            values = []
            for sign in (1, -1):
                training.gates[i] += sign * step
                values.append(training.accumulate(batch, count, 1.0)["loss"].item())
                training.gates[i] -= sign * step
            numeric[i] = (values[0] - values[1]) / (2 * step)
    torch.testing.assert_close(gradient, numeric, rtol=2e-2, atol=2e-4)
    # Micro-batches add up to the batch.
    training.gates.grad = None
    for part in batch.split(1):
        training.accumulate(part, count, 1.0)
    torch.testing.assert_close(training.gates.grad, gradient)
    assert all(p.grad is None for module in (teacher, twins) for p in module.parameters())


def test_gates_open_where_attention_is_worth_its_price(teacher, tmp_path):
    """The twin of layer 1 is useless, those of the others are the attention without positions itself."""
    copies = models.make_twins(teacher, "lightning").requires_grad_(False)
    for i in (0, 2):
        options = {"attn_use_rope": False, "attn_use_output_gate": False}
        copies[i] = from_teacher(teacher, [0, 1, 2], **options).model.layers[i].self_attn
    torch.nn.init.normal_(copies[1].o_proj.weight, std=1.0)
    training = gate_training(teacher, copies, price=0.3, steps=40)
    run = Run(training.at_step(random_batches(teacher.config.vocab_size)))
    train(training, run, tmp_path, CPU)
    gates = training.gates.sigmoid()
    assert gates[1] > 0.8 and gates[0] < 0.4 and gates[2] < 0.4
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert logged[-1]["divergence"] < logged[0]["divergence"] and len(logged[0]["gates"]) == LAYERS


def test_interrupted_training_of_gates_continues_bit_by_bit(teacher, twins, tmp_path):
    source = random_batches(teacher.config.vocab_size)
    whole = gate_training(teacher, twins, price=1.0)
    train(whole, Run(whole.at_step(source)), tmp_path / "whole", CPU)

    class Killed(Exception):
        pass

    def cut(start):
        for step, batch in enumerate(source(start), start):
            if step == 4:
                raise Killed
            yield batch

    part = gate_training(teacher, twins, price=1.0, checkpoint_every=2)
    with pytest.raises(Killed):
        train(part, Run(part.at_step(cut), identity={}), tmp_path / "part", CPU)
    part = gate_training(teacher, twins, price=1.0, checkpoint_every=2)
    train(part, Run(part.at_step(source), identity={}), tmp_path / "part", CPU)
    assert torch.equal(part.gates, whole.gates) and not torch.equal(whole.gates, torch.zeros(LAYERS))


def stage_tree(inputs, out, aligned=None, **select):
    tree = config_tree(inputs, "out") | {"out": str(out)}
    tree["select"] = tree["select"] | select
    return tree | ({"aligned": str(aligned)} if aligned else {})


@pytest.fixture(scope="module")
def aligned(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("aligned") / "out"
    pipeline = Pipeline(make_config(stage_tree(inputs, out)))
    for stage in ("transfer", "calibrate", "align"):
        pipeline.run_stage(stage)
    return out


def run_select(inputs, out, aligned, **select):
    pipeline = Pipeline(make_config(stage_tree(inputs, out, aligned, **select)))
    for stage in ("transfer", "calibrate", "align", "select"):
        pipeline.run_stage(stage)
    return json.loads((out / "select" / "selection.json").read_text())


def test_stage_says_its_cost_and_records_what_it_measured(inputs, aligned, tmp_path, capsys):
    record = run_select(inputs, tmp_path / "out", aligned)
    printed = capsys.readouterr().out
    assert "select     policy position takes 10 to 14 passes over 608 tokens: at most 8,512 tokens, " in printed
    assert f"softmax attention stays in layers {record['layers']} (policy: position)" in printed
    assert record["cost"]["passes"] >= 10 and record["cost"]["run_tokens"] == 608
    assert record["cost"]["tokens"] == record["cost"]["passes"] * 608 and record["cost"]["flops"] > 0
    assert [row["layer"] for row in record["table"]] == [0, 1, 2]
    names = {"M", "M_error", "N", "N_error", "score", "score_error", "kept_share", "recall_drop", "loss_rise"}
    assert all(names <= row.keys() for row in record["table"])
    assert all(row["score"] == pytest.approx(row["M"] - row["N"]) for row in record["table"])
    assert {step["round"] for step in record["exchanges"]} >= {1}


def test_positions_cost_nothing_where_the_student_keeps_them(inputs, aligned, tmp_path):
    tree = stage_tree(inputs, tmp_path / "out", aligned) | {"architecture": {"attn_use_rope": True}}
    pipeline = Pipeline(make_config(tree))
    for stage in ("transfer", "calibrate", "align", "select"):
        pipeline.run_stage(stage)
    table = json.loads((tmp_path / "out" / "select" / "selection.json").read_text())["table"]
    assert [row["N"] for row in table] == [0.0, 0.0, 0.0]
    assert [row["score"] for row in table] == pytest.approx([row["M"] for row in table]) and table[0]["M"] > 0


def test_policies_share_what_was_measured(inputs, aligned, tmp_path, monkeypatch):
    """A stage that is run again with another policy measures only what the first did not."""
    out = tmp_path / "out"
    first = run_select(inputs, out, aligned, policy="kl", measure_positions=False)
    assert "N" not in first["table"][0]
    (out / "select" / "done.json").unlink()
    before = len((out / "select" / "metrics.jsonl").read_text().splitlines())
    second = run_select(inputs, out, aligned, policy="position", exchange=0)
    after = (out / "select" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in after[before:]] == ["kept 0", "kept 1", "kept 2"]
    assert [row["M"] for row in first["table"]] == [row["M"] for row in second["table"]]


JOINT = {"policy": "joint", "joint_steps": 4, "joint_batch": 2, "joint_length": 80, "joint_seeds": 2}
JOINT |= {"joint_micro_batch": 2}


def test_joint_stage_trains_gates_and_cleans_up(inputs, aligned, tmp_path, capsys):
    record = run_select(inputs, tmp_path / "out", aligned, **JOINT)
    assert "policy joint takes 3 passes over 608 tokens and 1,280 tokens of training: " in capsys.readouterr().out
    assert len(record["layers"]) == 1 and all(0 < row["score"] < 1 for row in record["table"])
    assert all({"N", "score_error", "kept_share"} <= row.keys() and "M" not in row for row in record["table"])
    assert record["cost"]["runs"]["training_tokens"] == 1280
    for seed in (0, 1):
        (directory,) = (tmp_path / "out" / "select").glob(f"joint-{seed}-*")
        assert len((directory / "metrics.jsonl").read_text().splitlines()) >= 1
        assert not (directory / "checkpoints").exists()


def test_interrupted_joint_stage_keeps_the_seeds_that_are_done(inputs, aligned, tmp_path, monkeypatch):
    expected = run_select(inputs, tmp_path / "whole", aligned, **JOINT)
    from halo.stages import select

    original, trained = select.train_gates, []

    def interrupted(job, twins, seed):
        if seed == 1:
            raise KeyboardInterrupt
        return original(job, twins, seed)

    monkeypatch.setattr(select, "train_gates", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_select(inputs, tmp_path / "part", aligned, **JOINT)
    (first,) = (tmp_path / "part" / "select").glob("joint-0-*")
    assert (first / "checkpoints" / "step-4").is_dir()
    monkeypatch.setattr(select, "train_gates", original)
    accumulate = GateTraining.accumulate
    monkeypatch.setattr(GateTraining, "accumulate", lambda *a: trained.append(1) or accumulate(*a))
    assert run_select(inputs, tmp_path / "part", aligned, **JOINT)["table"] == expected["table"]
    assert len(trained) == 4  # those of the second seed


def test_interrupted_joint_stage_starts_anew_under_other_settings(inputs, aligned, tmp_path, monkeypatch):
    """The checkpoints of the first settings were once refused, and had to be deleted by hand."""
    from halo.stages import select

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(select, "train_gates", lambda *a: train_gates(*a) * interrupt())
        run_select(inputs, tmp_path / "out", aligned, **JOINT)
    changed = JOINT | {"joint_price": 0.5}
    expected = run_select(inputs, tmp_path / "whole", aligned, **changed)
    assert run_select(inputs, tmp_path / "out", aligned, **changed)["table"] == expected["table"]


def interrupt():
    raise KeyboardInterrupt


def test_gate_settings():
    settings = gate_settings(SelectSettings(joint_steps=200, joint_learning_rate=0.1))
    assert (settings.steps, settings.warmup, settings.final_learning_rate) == (200, 10, pytest.approx(0.01))


def test_report_has_a_table_with_what_positions_are_worth(inputs, aligned, tmp_path):
    record = run_select(inputs, tmp_path / "out", aligned)
    record |= {"equivalents": [[0, 1]], "layers": [0]}
    accepted = {"round": 1, "removed": 2, "added": 0, "gain": 0.25, "error": 0.05, "accepted": True}
    text = selection_section(record | {"exchanges": [accepted]}, tmp_path / "selection.png")
    head = next(line for line in text.splitlines() if line.startswith("| layer"))
    titles = ["layer", "M, nats", "N, nats", "recall drop", "loss rise, nats", "score", "kept in resamples"]
    assert [cell.strip() for cell in head.strip("|").split("|")] == titles
    row = record["table"][0]
    assert f"| **0** | {row['M']:.4f} ± {row['M_error']:.4f} | {row['N']:.4f} ± {row['N_error']:.4f} |" in text
    assert "what positions are worth in this layer" in text and "(policy: position)" in text
    assert "Layers 0 and 1 are equivalent within the error (kept: 0)." in text
    assert "1 tried, layer 0 replaces 2 and lowers the divergence by 0.2500 ± 0.0500 nats" in text
    assert (tmp_path / "selection.png").read_bytes().startswith(b"\x89PNG")
    # Gates without an error, and spaced layers.
    bare = {"policy": "joint", "layers": [1], "table": [{"layer": i, "score": 0.5} for i in range(3)]}
    assert "| **1** | 0.5 |" in selection_section(bare, tmp_path / "bare.png")
    spaced = selection_section({"policy": "uniform", "layers": [0]}, tmp_path / "none.png")
    assert spaced == "## Selection\n\nSoftmax attention stays in layers [0] (policy: uniform).\n"


def test_report_of_a_greedy_search_has_its_rounds(teacher, twins, corpus, tmp_path):
    settings = SETTINGS.model_copy(update={"policy": "greedy", "keep": 2})
    choice = choose(make_measurer(teacher, twins, corpus, Journal(tmp_path, {}), settings), settings)
    record = {"policy": "greedy", "layers": choice.layers, "rounds": choice.rounds}
    record["table"] = [{"layer": i, "score": float(score)} for i, score in enumerate(choice.scores)]
    text = selection_section(record, tmp_path / "selection.png")
    assert "| round | added |" in text and f"| 2 | {choice.rounds[1]['added']} | " in text
