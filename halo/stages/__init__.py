"""The stages of a conversion, in order. Each is one file: its settings, `run(job)`, and what it leaves behind."""

from types import ModuleType

STAGE_HELP = {
    "transfer": "Build a recurrent twin of every attention layer from its weights.",
    "calibrate": "Set decays, gates and gains of the twins by closed forms, from a little training text.",
    "align": "Stage 1: train each twin to reproduce the output of its attention layer.",
    "select": "Choose the layers that stay attention, by the measurements that select.policy calls for.",
    "distill": "Stage 2: train the hybrid to match the teacher's next-token distribution.",
    "finetune": "Stage 3: train on next-token loss with longer context.",
    "scale": "Choose the base of the attention scale on long text, and write the final model.",
    "eval": "Measure recall and bits per byte at multiples of the training length.",
}
STAGES = tuple(STAGE_HELP)
TRAINED_STAGES = ("align", "distill", "finetune")
# Stages whose results a conversion can reuse from another one (`aligned`).
ALIGNED_STAGES = ("transfer", "calibrate", "align")
# Seeds the order of a stage's samples of training text. Another number would give a run that is continued other data.
SAMPLE_ORDERS = {"align": 1, "select": 2, "distill": 3, "finetune": 4, "calibrate": 7}


def stage_module(name: str) -> ModuleType:
    """Import the file of a stage."""
    from importlib import import_module

    return import_module(f"halo.stages.{'evaluate' if name == 'eval' else name}")
