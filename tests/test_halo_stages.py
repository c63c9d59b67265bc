"""Every stage trains the intended parameters only, overfits one batch, and resumes bit for bit after a kill."""

import json
import os
import signal
import sys
from itertools import pairwise, repeat
from typing import ClassVar

import pytest
import torch
from compare import assert_matches_reference
from halo_tiny import LAYERS, config_tree, tiny_teacher, write_inputs
from torch import nn

from halo import models
from halo.cli import app
from halo.compute import Compute
from halo.config import make_config
from halo.data import Batch
from halo.pipeline import Pipeline
from halo.selection.variants import arranged, one_layer
from halo.settings import HaloError, TrainingSettings
from halo.stages.align import Align, AlignSettings
from halo.stages.distill import Distill, DistillSettings
from halo.stages.finetune import Finetune, FinetuneSettings
from halo.trainer import Run, Training, held_out_record, learning_rate, train

VOCABULARY, LENGTH = 61, 40
CPU = Compute(torch.device("cpu"))
BF16 = Compute(torch.device("cpu"), torch.bfloat16)
NUMBERS = {"steps": 60, "batch": 2, "length": LENGTH, "learning_rate": 1e-2, "final_learning_rate": 1e-3, "warmup": 5}
STAGES = ("align", "distill", "finetune")


def always(batch):
    """Train on the same batch at every step."""
    return Run(lambda step: repeat(batch))


def random_batch(sequences=2, documents=2):
    ids = torch.randint(VOCABULARY, (sequences, LENGTH), generator=torch.Generator().manual_seed(5))
    boundaries = torch.arange(LENGTH) * documents // LENGTH
    return Batch(ids, boundaries.int().expand(sequences, -1).contiguous())


def make_stage(name, mixer="lightning", isolate=False, **numbers):
    teacher = tiny_teacher(vocab_size=VOCABULARY)
    twins = models.make_twins(teacher, mixer)
    numbers = NUMBERS | numbers
    if name == "align":
        return Align(teacher, twins, AlignSettings(**numbers), isolate)
    student = models.make_student(teacher, twins, [1], mixer, "open")
    if name == "distill":
        return Distill(teacher, student, DistillSettings(**numbers), isolate)
    return Finetune(student, FinetuneSettings(**(numbers | {"micro_batch": None})), isolate)


def losses(directory):
    return [json.loads(line)["loss"] for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.parametrize("name", STAGES)
def test_stage_overfits_one_batch(name, isolate, tmp_path):
    train(make_stage(name, isolate=isolate), always(random_batch()), tmp_path, CPU)
    first, *_, last = losses(tmp_path)
    # Alignment cannot reach a loss of 0, because a decaying recurrence is no softmax; the other two stages can.
    assert last < (0.4 if name == "align" else 0.1) * first


@pytest.mark.parametrize("mixer", ["gdn", "mamba2"])
def test_twins_of_other_kinds_align(mixer, tmp_path):
    stage = make_stage("align", mixer=mixer, steps=12, length=16, warmup=2)
    batch = random_batch()
    train(stage, always(Batch(batch.input_ids[:, :16], batch.document_ids[:, :16])), tmp_path, CPU)
    first, *_, last = losses(tmp_path)
    assert last < 0.8 * first


def test_layers_of_align_are_independent():
    stage = make_stage("align")
    batch = random_batch()
    gradients = []
    for changed in (False, True):
        if changed:  # Another weight in one twin changes the gradient of that twin alone.
            with torch.no_grad():
                stage.mixers[1].q_proj.weight.mul_(1.5)
        stage.zero_grad()
        stage.accumulate(batch, stage.units(batch), 1.0)
        gradients.append([torch.cat([p.grad.flatten() for p in mixer.parameters()]) for mixer in stage.mixers])
    same = [torch.equal(*pair) for pair in zip(*gradients, strict=True)]
    assert same == [layer != 1 for layer in range(LAYERS)]


def test_clipping_one_layer_leaves_the_others_alone():
    stage = make_stage("align")
    groups = stage.clip_groups()
    assert len(groups) == LAYERS
    owned = [id(parameter) for group in groups for parameter in group]
    assert sorted(owned) == sorted(id(parameter) for parameter in stage.mixers.parameters())
    together = make_stage("align", clip_scope="all")
    assert len(together.clip_groups()) == 1


def test_layers_with_small_outputs_learn_as_fast(tmp_path):
    """AdamW's first step is the learning rate in every element, unless the gradient is as small as its epsilon."""
    stage = make_stage("align", steps=1, warmup=0)
    with torch.no_grad():
        for block in stage.teacher.model.layers:
            block.self_attn.o_proj.weight.mul_(1e-5)
        for mixer in stage.mixers:
            mixer.o_proj.weight.mul_(1e-5)
    before = [mixer.o_proj.weight.detach().clone() for mixer in stage.mixers]
    train(stage, always(random_batch()), tmp_path, CPU)
    for mixer, start in zip(stage.mixers, before, strict=True):
        moved = (mixer.o_proj.weight.detach() - start).abs() / NUMBERS["learning_rate"]
        assert (moved > 0.9).float().mean() > 0.99


@pytest.mark.parametrize("name", STAGES)
def test_weight_decay_is_for_matrices(name, tmp_path):
    """With a learning rate of 1 and a decay of 1, a step sets what decays to zero before AdamW's update of it."""
    moved = []
    for decay in (0.0, 1.0):
        stage = make_stage(name, mixer="gdn", steps=1, warmup=0, weight_decay=decay, learning_rate=1.0)
        before = {key: value.detach().clone() for key, value in stage.named_parameters()}
        train(stage, always(random_batch()), tmp_path / str(decay), CPU)
        moved.append({key: value.detach() - before[key] for key, value in stage.named_parameters()})
    for key, plain in moved[0].items():
        if plain.dim() > 1:
            assert_matches_reference(key, moved[1][key], (plain - before[key]).double())
            assert before[key].any() or key.endswith("o_gate.weight")  # which starts at zero
        else:
            assert torch.equal(moved[1][key], plain), key
    assert {"A_log", "dt_bias", "weight"} <= {key.rsplit(".", 1)[-1] for key, x in before.items() if x.dim() == 1}


def test_targets_of_align_are_the_teachers_mixer_outputs():
    stage = make_stage("align")
    batch = random_batch()
    calls = []
    with torch.no_grad(), models.observed_attention(stage.teacher, lambda layer, call: calls.append(call)):
        models.hidden_states(stage.teacher, batch)
    with torch.no_grad():
        block = stage.teacher.model.layers[0]
        x = block.input_layernorm(stage.teacher.model.embed_tokens(batch.input_ids))
    assert len(calls) == LAYERS and torch.equal(calls[0].x_BTD, x)
    residual = stage.teacher.model.embed_tokens(batch.input_ids) + calls[0].y_BTD
    after = residual + block.mlp(block.post_attention_layernorm(residual))
    assert_matches_reference("input of layer 1", calls[1].x_BTD, stage.teacher.model.layers[1].input_layernorm(after))
    assert not stage.teacher.model.layers[0].self_attn._forward_hooks


@pytest.mark.parametrize("name", ["align", "distill"])
def test_teacher_stays_bit_identical(name, tmp_path):
    stage = make_stage(name, steps=3)
    before = {key: value.clone() for key, value in stage.teacher.state_dict().items()}
    train(stage, always(random_batch()), tmp_path, CPU)
    after = stage.teacher.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert all(parameter.grad is None for parameter in stage.teacher.parameters())


def test_align_changes_mixers_only_and_distill_everything(tmp_path):
    stage = make_stage("align", steps=3)
    before = {key: value.clone() for key, value in stage.state_dict().items()}
    train(stage, always(random_batch()), tmp_path / "align", CPU)
    changed = {key for key, value in stage.state_dict().items() if not torch.equal(value, before[key])}
    weights = {name for name, parameter in stage.named_parameters()}
    assert changed == weights and all(key.startswith("mixers.") for key in changed)

    stage = make_stage("distill", steps=3)
    before = {key: value.clone() for key, value in stage.student.state_dict().items()}
    train(stage, always(random_batch()), tmp_path / "distill", CPU)
    unchanged = [key for key, value in stage.student.state_dict().items() if torch.equal(value, before[key])]
    assert unchanged and all(key.endswith(".log_decay") for key in unchanged)


@pytest.mark.parametrize("name", ["distill", "finetune"])
def test_recomputed_activations_give_the_same_gradient(name):
    gradients = []
    for checkpoint_activations in (False, True):
        stage = make_stage(name, checkpoint_activations=checkpoint_activations)
        batch = random_batch()
        stage.accumulate(batch, stage.units(batch), 1.0)
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in stage.parameters()]))
        assert stage.student.is_activation_checkpointing == checkpoint_activations
    assert torch.equal(*gradients)


@pytest.mark.parametrize("name", STAGES)
def test_bfloat16_arithmetic_trains_float32_weights(name, tmp_path):
    stage = make_stage(name, steps=30)
    train(stage, always(random_batch()), tmp_path, BF16)
    assert {parameter.dtype for parameter in stage.parameters()} == {torch.float32}
    first, *_, last = losses(tmp_path)
    assert last < 0.6 * first


@pytest.mark.parametrize("name", STAGES)
def test_micro_batches_give_the_gradient_of_the_batch(name):
    """Even if the micro-batches have different numbers of labels: one row is of short documents."""
    batch = random_batch()
    batch.document_ids[0] = torch.arange(LENGTH) // 2
    gradients = []
    for size in (None, 1):
        stage = make_stage(name)
        count = stage.units(batch)
        for part in batch.split(size):
            stage.accumulate(part, count, 1.0)
        gradients.append(torch.cat([p.grad.flatten().double() for p in stage.parameters() if p.grad is not None]))
    error = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
    assert error < 100 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("name", STAGES)
def test_held_out_loss_is_the_mean_over_its_batches_and_trains_nothing(name, tmp_path):
    stage, batch = make_stage(name, steps=4, held_out_every=2, log_every=100), random_batch()
    expected = held_out_record(stage, [batch], CPU)["loss"]
    assert expected == pytest.approx(held_out_record(stage, batch.split(1), CPU)["loss"], rel=1e-5)
    assert all(parameter.grad is None for parameter in stage.parameters())
    train(stage, Run(lambda step: repeat(batch), batch.split(1)), tmp_path, CPU)
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines if "held_out_loss" in line] == [2, 4]
    after = held_out_record(stage, [batch], CPU)
    assert lines[-1]["held_out_loss"] == pytest.approx(after["loss"], rel=1e-5) != expected
    assert {key for key in lines[-1] if key.startswith("held_out")} == {f"held_out_{name}" for name in after}


@pytest.mark.parametrize(("chosen", "wanted"), [(False, [False, True] * 2), (True, [True] * 4)])
def test_gradients_are_reduced_once_a_step_or_after_every_micro_batch(chosen, wanted, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("halo.trainer.synchronise", lambda training, wanted: asked.append(wanted))
    run = Run(lambda step: repeat(random_batch()), sync_every_micro_batch=chosen)
    train(make_stage("align", steps=2, micro_batch=1), run, tmp_path, CPU)
    assert asked == wanted


def test_isolated_documents_do_not_see_each_other():
    batch = random_batch(sequences=2, documents=2)
    for name in ("align", "distill"):
        stage = make_stage(name, isolate=True)
        for model in [stage.teacher] if name == "align" else [stage.teacher, stage.student]:
            model.eval()
            with torch.no_grad():
                packed = models.hidden_states(model, batch, isolate_documents=True)
                second = slice(LENGTH // 2, None)
                alone = models.hidden_states(model, Batch(batch.input_ids[:, second], batch.document_ids[:, second]))
                mixed = models.hidden_states(model, batch)
            assert_matches_reference(name, packed[:, second], alone.double())
            assert not torch.allclose(mixed[:, second], alone, atol=1e-2)


def test_open_gate_starts_where_the_teacher_is():
    """A randomly initialised gate halves the attention output; an open gate leaves it unchanged."""
    teacher = tiny_teacher(vocab_size=VOCABULARY)
    twins = models.make_twins(teacher, "lightning")
    outputs = {}
    for gate_init in ("open", "random"):
        student = models.make_student(teacher, twins, [1], "lightning", gate_init)
        mixer = models.mixers(student)[1]
        torch.manual_seed(0)
        outputs[gate_init] = models.run_mixer(mixer, torch.randn(1, 9, 32), None)
    ratio = outputs["random"].norm() / outputs["open"].norm()
    assert 0.4 < ratio < 0.6


def test_swapped_layer_is_the_twin_inside_and_the_teacher_outside():
    teacher = tiny_teacher(vocab_size=VOCABULARY)
    twins = models.make_twins(teacher, "lightning")
    batch = random_batch()
    with torch.no_grad():
        before = models.hidden_states(teacher, batch)
        with arranged(teacher, twins, one_layer("twin", 1, 3)):
            calls = []
            with models.observed_attention(teacher, lambda layer, call: calls.append(call)):
                inside = models.hidden_states(teacher, batch)
            expected = models.run_mixer(twins[1], calls[1].x_BTD, calls[1].position_embeddings)
            assert torch.equal(calls[1].y_BTD, expected)
        after = models.hidden_states(teacher, batch)
    assert torch.equal(before, after) and not torch.allclose(before, inside, atol=1e-2)


def test_learning_rate():
    numbers = TrainingSettings(steps=101, batch=1, learning_rate=1.0, final_learning_rate=0.1, warmup=10)
    rates = [learning_rate(step, numbers) for step in range(101)]
    assert rates[0] == 0.1 and rates[4] == 0.5 and rates[9] == rates[10] == 1.0
    assert rates[100] == pytest.approx(0.1) and rates[55] == pytest.approx(0.55)
    assert all(a > b for a, b in pairwise(rates[10:]))
    constant = numbers.model_copy(update={"final_learning_rate": 1.0})
    assert {learning_rate(step, constant) for step in range(10, 101)} == {1.0}


class Diverging(Training):
    name: ClassVar[str] = "diverging"

    def __init__(self, settings, from_step):
        super().__init__()
        self.settings, self.from_step, self.steps = settings, from_step, 0
        self.weight = nn.Parameter(torch.ones(1))

    def shard(self, compute):
        pass

    def units(self, batch):
        return torch.tensor(1.0)

    def accumulate(self, batch, count, scale):
        self.steps += 1
        loss = (self.weight * (torch.inf if self.steps >= self.from_step else 1.0)).sum()
        loss.backward()
        return {"loss": loss.detach()}


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    settings = TrainingSettings(steps=3, batch=1, length=LENGTH, learning_rate=1e-3)
    with pytest.raises(HaloError, match="diverging: loss and gradient must stay finite, got loss inf"):
        train(Diverging(settings, 1), always(random_batch()), tmp_path, CPU)


@pytest.mark.parametrize("checkpoint_every", [None, 3, 5])
def test_weights_that_are_not_finite_are_never_saved(tmp_path, checkpoint_every):
    """Whatever the intervals of logs and checkpoints, and even if no step after the last checkpoint is logged."""
    settings = TrainingSettings(
        steps=9, batch=1, length=LENGTH, learning_rate=1e-3, log_every=100, checkpoint_every=checkpoint_every
    )
    with pytest.raises(HaloError, match="must stay finite"):
        train(Diverging(settings, 5), always(random_batch()), tmp_path, CPU)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("*"))
    assert kept == (["step-3"] if checkpoint_every == 3 else [])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("inputs")
    write_inputs(directory)
    return directory


def run_until(pipeline, stage):
    for name in ("transfer", "calibrate", "align", "select", "distill", "finetune"):
        pipeline.run_stage(name)
        if name == stage:
            return


def metrics(directory):
    """Return the metrics that a stage logged, without times."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key not in ("seconds", "tokens_per_second")} for line in lines
    ]


def numbers_with_checkpoints(tree):
    return tree | {name: tree[name] | {"steps": 9, "checkpoint_every": 3} for name in STAGES}


def weights(out, name):
    file = "mixers.safetensors" if name == "align" else "model/model.safetensors"
    return (out / name / file).read_bytes()


class Killed(Exception):
    pass


@pytest.mark.parametrize("name", STAGES)
def test_interrupted_stage_resumes_bit_for_bit(name, inputs, tmp_path, monkeypatch, capsys):
    trees = {out: numbers_with_checkpoints(config_tree(inputs)) | {"out": str(tmp_path / out)} for out in "ab"}
    whole = Pipeline(make_config(trees["a"]))
    run_until(whole, name)

    cut = Pipeline(make_config(trees["b"]), like=whole)
    stage_class = {"align": Align, "distill": Distill, "finetune": Finetune}[name]
    original, calls = stage_class.accumulate, []

    def accumulate(self, batch, count, scale):
        calls.append(None)
        if len(calls) > (5 * cut.config.finetune.batch if name == "finetune" else 5):
            raise Killed
        return original(self, batch, count, scale)

    monkeypatch.setattr(stage_class, "accumulate", accumulate)
    with pytest.raises(Killed):
        run_until(cut, name)
    assert len(metrics(tmp_path / "b" / name)) == 5
    assert not (tmp_path / "b" / name / "done.json").exists()

    monkeypatch.setattr(stage_class, "accumulate", original)
    torch.manual_seed(999)
    # How it is computed and logged may change on the way.
    changed = trees["b"] | {name: trees["b"][name] | {"checkpoint_every": 4, "checkpoint_minutes": 1.0}}
    run_until(Pipeline(make_config(changed), like=whole), name)
    assert f"{name}: continues after step 3" in capsys.readouterr().out
    assert metrics(tmp_path / "b" / name) == metrics(tmp_path / "a" / name)
    assert weights(tmp_path / "a", name) == weights(tmp_path / "b", name)
    assert not (tmp_path / "b" / name / "checkpoints").exists()


def test_a_resume_needs_no_metrics_file(inputs, tmp_path, monkeypatch):
    """A stage whose log was moved away continues; the log then begins at the checkpoint."""
    tree = numbers_with_checkpoints(config_tree(inputs)) | {"out": str(tmp_path / "out")}
    pipeline = Pipeline(make_config(tree))
    run_until(pipeline, "align")
    (tmp_path / "out" / "align" / "done.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr("halo.models.save_mixers", lambda state, path: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            pipeline.run_stage("align")
    (tmp_path / "out" / "align" / "metrics.jsonl").unlink()
    pipeline.run_stage("align")
    assert (tmp_path / "out" / "align" / "done.json").exists()


def stopped_run(name, path, errors):
    """Run the first two stages from the command line in a child process, which gets a signal at step 5 of align.

    Returns:
        The exit code and the lines of standard error.
    """
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return code, errors.read_text().splitlines()
    code, calls, original = 1, [], Align.accumulate

    def accumulate(self, *arguments):
        calls.append(None)
        if len(calls) == 5:
            os.kill(os.getpid(), getattr(signal, name))
        return original(self, *arguments)

    try:
        sys.stderr = errors.open("w", buffering=1)
        Align.accumulate = accumulate
        for stage in ("transfer", "calibrate", "align"):
            app([stage, "--config", str(path)], standalone_mode=stage == "align")
    except SystemExit as end:
        code = end.code
    finally:
        os._exit(code)


@pytest.mark.parametrize(
    ("name", "step", "code"), [("SIGKILL", 3, -signal.SIGKILL), ("SIGTERM", 5, 2), ("SIGINT", 5, 2)]
)
def test_stopped_process_resumes_bit_for_bit(name, step, code, inputs, tmp_path, capsys):
    """A kill loses the steps after the last checkpoint; SIGTERM and Ctrl-C lose none."""
    paths = {}
    for out in "ab":
        tree = numbers_with_checkpoints(config_tree(inputs)) | {"out": str(tmp_path / out), "threads": 1}
        paths[out] = tmp_path / f"{out}.yaml"
        paths[out].write_text(json.dumps(tree))
    found, lines = stopped_run(name, paths["a"], tmp_path / "errors")
    assert found == code, lines
    if name != "SIGKILL":
        assert lines[-1] == "halo: align: stopped and saved after step 5; the same command continues"
    threads = torch.get_num_threads()
    try:
        for out in "ab":
            run_until(Pipeline(make_config(json.loads(paths[out].read_text()))), "align")
    finally:
        torch.set_num_threads(threads)
    assert capsys.readouterr().out.count(f"continues after step {step}") == 1
    assert metrics(tmp_path / "a" / "align") == metrics(tmp_path / "b" / "align")
    assert len(metrics(tmp_path / "a" / "align")) == 9
    assert weights(tmp_path / "a", "align") == weights(tmp_path / "b", "align")


def test_checkpoint_of_another_run_is_refused(inputs, tmp_path, monkeypatch):
    tree = numbers_with_checkpoints(config_tree(inputs)) | {"out": str(tmp_path / "out")}
    run_until(Pipeline(make_config(tree)), "calibrate")
    with monkeypatch.context() as patch:
        patch.setattr("halo.models.save_mixers", lambda state, path: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            run_until(Pipeline(make_config(tree)), "align")
    changed = tree | {"align": tree["align"] | {"learning_rate": 2e-3}}
    with pytest.raises(HaloError, match=r"comes from another run \(align.learning_rate: 0.001 there, 0.002 now\)"):
        run_until(Pipeline(make_config(changed)), "align")
