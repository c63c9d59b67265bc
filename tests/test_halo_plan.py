"""`halo plan`: operations and memory are those of the code that runs, hours those that were published."""

import json
from importlib import resources

import pytest
import torch
from halo_tiny import LAYERS, config_tree, tiny_teacher
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, Qwen3Config
from typer.testing import CliRunner

from halo import models
from halo.cli import app
from halo.config import load_config, make_config
from halo.data import Batch
from halo.estimate import plan
from halo.flops import LayerSize, model_size, stage_flops_per_token, student_size, training_flops
from halo.footprint import layer_bytes
from halo.hardware import Machine, parse_gpus, peak_flops
from halo.plan import QWEN3, find_teacher
from halo.settings import HaloError
from halo.stages import STAGES
from halo.stages.align import Align
from halo.stages.distill import Distill
from halo.stages.finetune import Finetune
from hypenet import HypeNetForCausalLM, config_from_teacher

PRESETS = {"hypenet-2b": "1.7B", "hypenet-5b": "4B", "hypenet-9b": "8B"}
# Parameters of teacher and student; FLOPs of the whole recipe with recomputation in stages 2 and 3, counted by hand (as
# if each layer were recomputed to its end).
PUBLISHED = {
    "hypenet-2b": (1_720_574_976, 1_926_138_880, 3.8e19),
    "hypenet-5b": (4_022_468_096, 4_824_739_328, 9.7e19),
    "hypenet-9b": (8_190_735_360, 9_474_302_976, 1.7e20),  # its head is not tied
}
RECOMPUTE = ("distill.checkpoint_activations=true", "finetune.checkpoint_activations=true")
TRAINED = ("align", "distill", "finetune")


def planned(name, gpus, *changes):
    config = load_config(name, changes)
    return plan(config, gpus, find_teacher(config.teacher))


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_operations_of_the_published_models(name):
    teacher, student, flops = PUBLISHED[name]
    found = planned(name, "A800", *RECOMPUTE)
    assert (found.teacher, found.student) == (teacher, student)
    assert sum(stage.flops for stage in found.stages if stage.name in TRAINED) == pytest.approx(flops, rel=0.06)


def test_tied_head_is_counted_once():
    config = find_teacher("Qwen/Qwen3-8B")
    config.tie_word_embeddings = True
    assert student_size(config, "lightning", range(9)).parameters == 8_851_973_120


def test_hours_are_the_published_ones():
    stages = {stage.name: stage for stage in planned("hypenet-2b", "A800", *RECOMPUTE).stages}
    for name, hours in (("align", 10.0), ("distill", 43.4), ("finetune", 37.7)):
        assert stages[name].hours == pytest.approx(hours, rel=0.05)
    tokens = [stages[name].tokens for name in TRAINED]
    assert tokens == [327_680_000, 983_040_000, 1_048_576_000]
    # A kept layer of 16k tokens costs more per token than one of 512, and recomputing a quarter more.
    assert stages["finetune"].flops / stages["finetune"].tokens > 1.5e10


@pytest.mark.parametrize("mixer", ["lightning", "gdn", "mamba2"])
@pytest.mark.parametrize(
    ("stage", "recompute"),
    [("align", False), ("distill", False), ("distill", True), ("finetune", False), ("finetune", True)],
)
def test_linear_layers_cost_what_a_step_of_the_stage_executes(stage, mixer, recompute, monkeypatch):
    teacher = tiny_teacher(vocab_size=300)
    section = {"steps": 1, "batch": 2, "length": 48} | ({"checkpoint_activations": True} if recompute else {})
    settings = getattr(make_config({"teacher": "x", "out": "y", "data": {"source": "z"}, stage: section}), stage)
    twins = models.make_twins(teacher, mixer)
    if stage == "align":
        training = Align(teacher, twins, settings)
    else:
        student = models.make_student(teacher, twins, [1], mixer, "open")
        training = Distill(teacher, student, settings) if stage == "distill" else Finetune(student, settings)
    ids = torch.randint(300, (2, 48))
    batch = Batch(ids, torch.zeros_like(ids, dtype=torch.int32))

    def multiplied(out, a, b, out_shape=None, **kwargs):
        return 2 * a[0] * a[1] * b[1]

    in_place = {torch.ops.aten.addmm_: multiplied}  # which the counter does not know
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        training.accumulate(batch, torch.tensor(1.0), 1.0)
    products = counter.get_flop_counts()["Global"]
    executed = sum(flops for op, flops in products.items() if "mm" in str(op))
    monkeypatch.setattr(LayerSize, "mixing", lambda self, length: 0.0)
    student = student_size(teacher.config, mixer, () if stage == "align" else [1])
    expected = training_flops(stage, model_size(teacher.config), student, 48, recompute)
    assert executed / ids.numel() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["lightning", "gdn", "mamba2", "attn"])
def test_activations_are_what_a_layer_saves(kind, dtype):
    length = 250  # no other size
    teacher = {"vocab_size": 320, "hidden_size": 224, "intermediate_size": 760, "num_attention_heads": 4}
    teacher |= {"num_key_value_heads": 2, "head_dim": 64}

    def saved(layers):
        config = Qwen3Config(**teacher, num_hidden_layers=layers)
        keep = range(layers) if kind == "attn" else ()
        config = config_from_teacher(config, keep, "lightning" if kind == "attn" else kind)
        model = HypeNetForCausalLM(config).train()
        storages = {}

        def pack(x):
            if length in x.shape:
                storages[x.untyped_storage().data_ptr()] = x
            return x

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            ids = torch.randint(320, (1, length))
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        assert hidden.requires_grad
        return sum(x.untyped_storage().nbytes() for x in storages.values()), model_size(config)

    (one, _), (three, size) = saved(1), saved(3)
    machine = Machine(1, 1, 1e9, 1e12, dtype.itemsize, cuda=False)
    expected = layer_bytes(size.layers[0], size.hidden, size.intermediate, machine)
    assert (three - one) / 2 / length == pytest.approx(expected, rel=0.01)


def test_activations_on_a_gpu_have_states():
    layer = student_size(find_teacher("Qwen/Qwen3-1.7B"), "lightning", ()).layers[0]
    cuda, cpu = (Machine(1, 1, 1e9, 1e12, 2, cuda=on) for on in (True, False))
    # Per token of a width of 2,048: a bf16 state of 128 x 128 for each of 16 heads every 64 tokens.
    difference = layer_bytes(layer, 2048, 6144, cuda) - layer_bytes(layer, 2048, 6144, cpu)
    assert difference == 2 * 16 * 128 * 128 / 64


def test_fewer_layers_or_tokens_need_less_memory():
    base = {stage.name: stage.memory for stage in planned("hypenet-2b", "8xH100").stages}
    less = {
        stage.name: stage.memory
        for stage in planned("hypenet-2b", "8xH100", "distill.micro_batch=6", *RECOMPUTE).stages
    }
    assert less["distill"].activations < base["distill"].activations / 8
    # Until the last of two micro-batches every process has all gradients.
    assert less["distill"].gradients > 3 * base["distill"].gradients
    alone = {stage.name: stage.memory for stage in planned("hypenet-2b", "H100").stages}
    assert alone["distill"].optimizer == 8 * base["distill"].optimizer == 8 * 1_926_138_880


def test_main_memory_is_that_of_the_models_of_every_process_of_a_node():
    config = load_config("hypenet-2b")
    teacher = find_teacher(config.teacher)
    mixers = sum(layer.mixer_parameters for layer in student_size(teacher, "lightning", ()).layers)
    for dtype, width in ((torch.bfloat16, 2), (None, 4)):
        teacher.dtype = dtype
        found = plan(config, "16xH100", teacher)
        built = width * found.teacher + 4 * (found.student + mixers / 4)
        assert found.host == 8 * built


def test_gradients_are_reduced_after_every_micro_batch_where_whole_ones_do_not_fit():
    def distill(gpus, choice):
        changes = ("distill.micro_batch=1", f"distill.sync_every_micro_batch={choice}")
        stages = planned("hypenet-9b", gpus, *changes).stages
        return next(stage.memory for stage in stages if stage.name == "distill")

    student = planned("hypenet-9b", "8xH100").student
    whole, shares = distill("8xH100", "false"), distill("8xH100", "true")
    assert whole.gradients == 4 * student * (1 + 1 / 8) and shares.gradients < whole.gradients / 2
    assert not whole.sync_every_micro_batch and shares.sync_every_micro_batch
    assert whole.total > 75 * 2**30 > shares.total
    assert distill("8xH100", "auto") == shares
    assert distill("8xH200", "auto") == distill("8xH200", "false")
    assert distill("H100", "auto").gradients == distill("H100", "true").gradients == 4 * student  # one process


@pytest.mark.parametrize(
    ("name", "gpus"), [("hypenet-2b", "8xH100"), ("hypenet-5b", "8xA800"), ("hypenet-9b", "8xH200")]
)
def test_preset_fits_the_machine_that_it_is_for(name, gpus):
    found = planned(name, gpus)
    assert not found.too_large() and found.shards > 9e9 and found.disk > 5 * 4 * found.student
    assert found.stages[0].name == "transfer" and found.hours > 1


def test_stage_that_does_not_fit_is_named_with_a_remedy():
    printed = CliRunner().invoke(app, ["plan", "--config", "hypenet-9b", "--gpus", "H100"])
    assert printed.exit_code == 0
    lines = [line for line in printed.stdout.splitlines() if line.startswith("! ")]
    assert any(
        line.startswith("! distill takes ") and line.endswith("needs a smaller distill.micro_batch or more memory")
        for line in lines
    )


@pytest.mark.parametrize("path", sorted((resources.files("halo") / "configs").iterdir()), ids=lambda path: path.name)
def test_every_shipped_configuration_can_be_planned(path, tmp_path):
    arguments = ["--gpus", "8xH100" if path.name.startswith("hypenet") else "cpu@0.2"]
    if path.name == "smollm2-135m.yaml":  # its teacher is in a package of its own
        sizes = {"vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
        sizes |= {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
        LlamaConfig(**sizes).save_pretrained(tmp_path)
        arguments += ["--teacher-config", str(tmp_path)]
    printed = CliRunner().invoke(app, ["plan", "--config", str(path), *arguments])
    assert printed.exit_code == 0, printed.output
    for stage in (*STAGES, "total"):
        assert f"\n{stage} " in printed.stdout
    if path.name == "smollm2-135m.yaml":
        assert "teacher 0.135 B parameters" in printed.stdout


def test_json_has_the_numbers_of_the_table():
    result = CliRunner().invoke(app, ["plan", "--config", "hypenet-2b", "--gpus", "8xH100", "--json"])
    record = json.loads(result.stdout)
    stages = {stage["name"]: stage for stage in record["stages"]}
    assert record["total"]["hours"] == pytest.approx(sum(stage["hours"] for stage in stages.values()))
    assert stages["distill"]["memory"]["total"] > 1e10 and stages["transfer"]["memory"] is None
    assert record["total"]["fits"] is True and stages["finetune"]["tokens"] == 1_048_576_000


def test_teacher_from_a_file(tmp_path):
    config = LlamaConfig(
        vocab_size=500, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4
    )
    config.save_pretrained(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps(config_tree(tmp_path)))
    arguments = ["plan", "--config", str(tmp_path / "run.json"), "--gpus", "cpu@1", "--json", "--teacher-config"]
    for path in (tmp_path, tmp_path / "config.json"):
        result = CliRunner().invoke(app, [*arguments, str(path)])
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["teacher"] == model_size(config).parameters
    wrong = CliRunner().invoke(app, [*arguments, str(tmp_path / "nowhere.json")])
    assert wrong.exit_code == 2 and wrong.stderr.startswith(
        "halo: --teacher-config: must be the config.json of a teacher"
    )


def test_cost_of_selection_follows_the_policy(tmp_path):
    teacher, tree = tiny_teacher(vocab_size=300).config, config_tree(tmp_path)
    tokens = 3 * 160 + 4 * 32

    def selection(**select):
        planned = plan(make_config(tree | {"select": tree["select"] | select}), "cpu@1", teacher)
        return next(stage for stage in planned.stages if stage.name == "select")

    assert selection(policy="kl", measure_positions=False).tokens == (1 + LAYERS) * tokens
    assert selection(policy="kl").tokens == selection(exchange=0).tokens == (1 + 2 * LAYERS) * tokens
    # Three rounds of exchanges, of one kept layer with two others, and the student to begin with.
    assert selection().tokens == (1 + 2 * LAYERS + 1 + 3 * 2) * tokens
    assert selection(policy="greedy", keep=2).tokens == (1 + LAYERS + LAYERS - 1 + LAYERS) * tokens
    assert selection(policy="uniform").tokens == selection(policy="uniform-late").flops == 0
    gates = {"policy": "joint", "joint_steps": 10, "joint_batch": 4, "joint_length": 100, "measure_positions": False}
    joint = selection(**gates, joint_micro_batch=4)
    assert joint.tokens == 4000 and joint.steps == 10
    size = model_size(teacher)
    # More than teacher and student forward, with their heads, and less than if weights were trained.
    least = size.forward(100) + 2 * size.head() + size.forward(100)
    assert 4000 * least < joint.flops < 4000 * 4 * least
    recomputed = selection(policy="kl", measure_positions=False, cache_gib=0).flops
    cached = selection(policy="kl", measure_positions=False).flops
    forward = 3 * 160 * size.forward(160) + 4 * 32 * size.forward(32)
    assert recomputed - cached == pytest.approx(LAYERS * forward)


def test_gates_take_the_memory_of_both_branches():
    def memory(*changes):
        found = planned("hypenet-2b", "8xH100", *changes)
        return next(stage for stage in found.stages if stage.name == "select").memory.activations

    one, two = (memory("select.policy=joint", f"select.joint_micro_batch={size}") for size in (1, 2))
    assert two == pytest.approx(2 * one) and one > memory("select.policy=position")
    # 2048 tokens in 28 layers, each with at least the inputs of attention, twin and MLP in bfloat16.
    assert one > 2048 * 28 * 3 * 2 * 2048


def test_given_or_even_layers_and_aligned_twins_cost_nothing(tmp_path):
    teacher = tiny_teacher(vocab_size=300).config
    tree = config_tree(tmp_path) | {"aligned": str(tmp_path), "select": {"layers": [0, 2]}}
    stages = {stage.name: stage for stage in plan(make_config(tree), "cpu@1", teacher).stages}
    assert "align" not in stages and stages["select"].flops == 0


@pytest.mark.parametrize(
    ("gpus", "message"),
    [
        ("8xB1", "--gpus: must be like 8xH100, of A100, "),
        ("eight", "--gpus: must be like 8xH100"),
        ("0xH100", "--gpus: numbers must be positive, got 0xH100"),
        ("H100@3", "--gpus: must be like 8xH100"),
        ("12xH100", "--gpus: more than 8 must be a multiple of it (whole nodes), got 12"),
        ("3xH100", "align.batch: must be a multiple of the 3 processes, got 32"),
    ],
)
def test_unknown_hardware_is_one_line(gpus, message):
    result = CliRunner().invoke(app, ["plan", "--config", "hypenet-2b", "--gpus", gpus])
    assert result.exit_code == 2 and result.stderr.startswith(f"halo: {message}") and result.stderr.count("\n") == 1


def test_fp32_is_for_the_cpu():
    with pytest.raises(HaloError, match="precision: must be bf16 or auto on CUDA"):
        planned("hypenet-2b", "H100", "precision=fp32")


def test_hardware_by_name():
    assert parse_gpus("16xh200") == (16, "H200", None) and parse_gpus("cpu@0.25") == (1, "cpu", 0.25)
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12 and peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-40GB") == peak_flops("NVIDIA A800-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA H200") == 989e12 and peak_flops("Tesla T4") is None


def test_measured_cpu():
    found = planned("demo", "cpu")
    assert 1e9 < found.machine.peak < 1e14 and not found.too_large() and 0 < found.hours < 10


def test_operations_per_token_for_the_training_loop():
    teacher = find_teacher("Qwen/Qwen3-1.7B-Base")
    model = stage_flops_per_token("distill", teacher, "lightning", 512)
    hardware = stage_flops_per_token("distill", teacher, "lightning", 512, recompute=True)
    assert (model, hardware) == (pytest.approx(15.2e9, rel=0.01), pytest.approx(17.8e9, rel=0.01))
    assert set(QWEN3) == set(PRESETS.values())
    with pytest.raises(ValueError, match="stage must be align, distill or finetune, got 'select'"):
        stage_flops_per_token("select", teacher, "lightning", 512)
