"""Every stage trains the intended parameters only, overfits one batch, and resumes bit for bit after a kill."""

import json
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from itertools import pairwise, repeat
from typing import ClassVar

import pytest
import torch
from compare import assert_matches_reference
from halo_tiny import LAYERS, config_tree, tiny_teacher, write_inputs
from torch import nn

from halo import models
from halo.config import AlignSettings, DistillSettings, FinetuneSettings, HaloError, TrainingSettings, make_config
from halo.conversion import Conversion
from halo.data import Batch
from halo.stages.align import Align
from halo.stages.distill import Distill
from halo.stages.finetune import Finetune
from halo.trainer import learning_rate, train

VOCABULARY, LENGTH = 61, 40
CPU = torch.device("cpu")
NUMBERS = {"steps": 60, "batch": 2, "length": LENGTH, "learning_rate": 1e-2, "final_learning_rate": 1e-3, "warmup": 5}
STAGES = ("align", "distill", "finetune")


class OneBatch:
    """Yield the same batch forever, in place of a data loader."""

    def __init__(self, batch):
        self.batch = batch

    def __iter__(self):
        return repeat(self.batch)

    def state_dict(self):
        return {}


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
    train(make_stage(name, isolate=isolate), OneBatch(random_batch()), tmp_path, CPU)
    first, *_, last = losses(tmp_path)
    # Alignment cannot reach a loss of 0, because a decaying recurrence is no softmax; the other two stages can.
    assert last < (0.4 if name == "align" else 0.1) * first


def test_gdn_twins_align(tmp_path):
    stage = make_stage("align", mixer="gdn", steps=12, length=16, warmup=2)
    batch = random_batch()
    train(stage, OneBatch(Batch(batch.input_ids[:, :16], batch.document_ids[:, :16])), tmp_path, CPU)
    first, *_, last = losses(tmp_path)
    assert last < 0.8 * first


def test_layers_of_align_are_independent():
    stage = make_stage("align")
    mixers = stage.build()
    for layer in range(LAYERS):
        mixers.zero_grad()
        losses, _ = stage.layer_losses(random_batch())
        losses[layer].backward()
        for other, mixer in enumerate(mixers):
            touched = any(p.grad is not None and p.grad.abs().max() > 0 for p in mixer.parameters())
            assert touched == (other == layer)


def test_clipping_one_layer_leaves_the_others_alone():
    stage = make_stage("align")
    groups = stage.clip_groups(stage.build())
    assert len(groups) == LAYERS
    owned = [id(parameter) for group in groups for parameter in group]
    assert sorted(owned) == sorted(id(parameter) for parameter in stage.mixers.parameters())
    together = make_stage("align", clip_scope="all")
    assert len(together.clip_groups(together.build())) == 1


def test_targets_of_align_are_the_teachers_mixer_outputs():
    stage = make_stage("align")
    batch = random_batch()
    with torch.no_grad(), models.recorded_attention(stage.teacher) as calls:
        models.hidden_states(stage.teacher, batch)
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
    train(stage, OneBatch(random_batch()), tmp_path, CPU)
    after = stage.teacher.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert all(parameter.grad is None for parameter in stage.teacher.parameters())


def test_align_changes_mixers_only_and_distill_everything(tmp_path):
    stage = make_stage("align", steps=3)
    before = {key: value.clone() for key, value in stage.student.state_dict().items()}
    train(stage, OneBatch(random_batch()), tmp_path / "align", CPU)
    changed = {key for key, value in stage.student.state_dict().items() if not torch.equal(value, before[key])}
    assert changed and all(".self_attn." in key for key in changed)

    stage = make_stage("distill", steps=3)
    before = {key: value.clone() for key, value in stage.student.state_dict().items()}
    train(stage, OneBatch(random_batch()), tmp_path / "distill", CPU)
    unchanged = [key for key, value in stage.student.state_dict().items() if torch.equal(value, before[key])]
    assert unchanged == []


@pytest.mark.parametrize("name", ["distill", "finetune"])
def test_recomputed_activations_give_the_same_gradient(name):
    gradients = []
    for checkpoint_activations in (False, True):
        stage = make_stage(name, checkpoint_activations=checkpoint_activations)
        module = stage.build()
        stage.loss(random_batch())[0].backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in module.parameters()]))
        assert module.is_activation_checkpointing == checkpoint_activations
    assert torch.equal(*gradients)


@pytest.mark.parametrize("name", STAGES)
def test_bfloat16_arithmetic_trains_float32_weights(name, tmp_path):
    module = train(make_stage(name, steps=30), OneBatch(random_batch()), tmp_path, CPU, precision="bf16")
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    first, *_, last = losses(tmp_path)
    assert last < 0.6 * first


@pytest.mark.parametrize("name", STAGES)
def test_micro_batches_give_the_gradient_of_the_batch(name):
    gradients = []
    for size in (None, 1):
        stage = make_stage(name)
        module = stage.build()
        parts = random_batch().split(size)
        for part in parts:
            (stage.loss(part)[0] / len(parts)).backward()
        gradients.append(torch.cat([p.grad.flatten().double() for p in module.parameters() if p.grad is not None]))
    error = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
    assert error < 100 * torch.finfo(torch.float32).eps


def test_isolated_documents_do_not_see_each_other():
    batch = random_batch(sequences=2, documents=2)
    for name in ("align", "distill"):
        stage = make_stage(name, isolate=True)
        for model in [stage.teacher, stage.student]:
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
        with models.swapped(teacher, twins, 1):
            with models.recorded_attention(teacher) as calls:
                inside = models.hidden_states(teacher, batch)
            expected = models.run_mixer(models.mixers(twins)[1], calls[1].x_BTD, calls[1].position_embeddings)
            assert torch.equal(calls[1].y_BTD, expected)
        after = models.hidden_states(teacher, batch)
    assert torch.equal(before, after) and not torch.allclose(before, inside, atol=1e-2)


def test_learning_rate():
    numbers = TrainingSettings(steps=101, batch=1, learning_rate=1.0, final_learning_rate=0.1, warmup=10)
    rates = [learning_rate(step, numbers) for step in range(101)]
    assert rates[0] == 0 and rates[5] == 0.5 and rates[10] == 1.0
    assert rates[100] == pytest.approx(0.1) and rates[55] == pytest.approx(0.55)
    assert all(a > b for a, b in pairwise(rates[10:]))
    constant = numbers.model_copy(update={"final_learning_rate": 1.0})
    assert {learning_rate(step, constant) for step in range(10, 101)} == {1.0}


@dataclass
class Diverging:
    settings: TrainingSettings
    name: ClassVar[str] = "diverging"
    weight: nn.Parameter = field(default_factory=lambda: nn.Parameter(torch.ones(1)))

    def build(self):
        return nn.ParameterList([self.weight])

    def loss(self, batch):
        loss = (self.weight * torch.inf).sum()
        return loss, {"loss": loss.detach()}

    def clip_groups(self, module):
        return [list(module)]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    settings = TrainingSettings(steps=3, batch=1, length=LENGTH, learning_rate=1e-3)
    with pytest.raises(HaloError, match="diverging: loss and gradient must stay finite, got loss inf"):
        train(Diverging(settings), OneBatch(random_batch()), tmp_path, CPU)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("inputs")
    write_inputs(directory)
    return directory


def run_until(conversion, stage):
    for name in conversion.stages:
        conversion.run_stage(name)
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


class Killed(Exception):
    pass


@pytest.mark.parametrize("name", STAGES)
def test_interrupted_stage_resumes_bit_for_bit(name, inputs, tmp_path, monkeypatch, capsys):
    trees = {out: numbers_with_checkpoints(config_tree(inputs)) | {"out": str(tmp_path / out)} for out in "ab"}
    whole = Conversion(make_config(trees["a"]))
    run_until(whole, name)

    cut = Conversion(make_config(trees["b"]), like=whole)
    stage_class = {"align": Align, "distill": Distill, "finetune": Finetune}[name]
    original, calls = stage_class.loss, []

    def loss(self, batch):
        calls.append(None)
        if len(calls) > 5 * cut.config.finetune.batch if name == "finetune" else len(calls) > 5:
            raise Killed
        return original(self, batch)

    monkeypatch.setattr(stage_class, "loss", loss)
    with pytest.raises(Killed):
        run_until(cut, name)
    assert len(metrics(tmp_path / "b" / name)) == 5
    assert not (tmp_path / "b" / name / "done.json").exists()

    monkeypatch.setattr(stage_class, "loss", original)
    torch.manual_seed(999)
    run_until(Conversion(make_config(trees["b"]), like=whole), name)
    assert f"{name}: continues after step 3" in capsys.readouterr().out
    assert metrics(tmp_path / "b" / name) == metrics(tmp_path / "a" / name)
    weights = [(tmp_path / out / name / "model.safetensors").read_bytes() for out in "ab"]
    assert weights[0] == weights[1]
    assert not (tmp_path / "b" / name / "checkpoint.pt").exists()


KILLED_RUN = """
import os, signal, sys
from pathlib import Path
from halo.config import load_config
from halo.conversion import Conversion
from halo.stages.align import Align

calls, original = [], Align.loss
def loss(self, batch):
    calls.append(None)
    if len(calls) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, batch)
Align.loss = loss
conversion = Conversion(load_config(sys.argv[1]))
conversion.run_stage("transfer")
conversion.run_stage("align")
"""


def test_killed_process_resumes_bit_for_bit(inputs, tmp_path, capsys):
    paths = {}
    for out in "ab":
        tree = numbers_with_checkpoints(config_tree(inputs)) | {"out": str(tmp_path / out), "threads": 1}
        paths[out] = tmp_path / f"{out}.yaml"
        paths[out].write_text(json.dumps(tree))
    run = subprocess.run([sys.executable, "-c", KILLED_RUN, str(paths["a"])], capture_output=True, text=True)
    assert run.returncode == -signal.SIGKILL, run.stderr
    threads = torch.get_num_threads()
    try:
        for out in "ab":
            run_until(Conversion(make_config(json.loads(paths[out].read_text()))), "align")
    finally:
        torch.set_num_threads(threads)
    assert capsys.readouterr().out.count("continues after step 3") == 1
    assert metrics(tmp_path / "a" / "align") == metrics(tmp_path / "b" / "align")
    assert len(metrics(tmp_path / "a" / "align")) == 9


def test_checkpoint_of_other_settings_is_refused(inputs, tmp_path):
    tree = numbers_with_checkpoints(config_tree(inputs)) | {"out": str(tmp_path / "out")}
    conversion = Conversion(make_config(tree))
    run_until(conversion, "align")
    checkpoint = tmp_path / "out" / "align" / "checkpoint.pt"
    (tmp_path / "out" / "align" / "done.json").unlink()
    torch.save({"settings": {"steps": 1}}, checkpoint)
    with pytest.raises(HaloError, match="must come from the same align settings"):
        conversion.run_stage("align")
