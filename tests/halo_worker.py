"""Runs conversions of JSON configurations, one after the other, in each process that torchrun starts.

torchrun -m halo_worker CONFIG... [--kill STAGE STEP] [--until STAGE] [--replicate]
"""

import argparse
import json
import os
import signal
from pathlib import Path

import torch

from halo.config import make_config
from halo.pipeline import Pipeline
from halo.stages import STAGES
from halo.stages.align import Align
from halo.stages.distill import Distill
from halo.stages.finetune import Finetune

CLASSES = {"align": Align, "distill": Distill, "finetune": Finetune}


def kill_at(stage, step, micro_batches=1):
    """Kill the last process at a step of a stage, with its other ranks left to notice."""
    training, calls = CLASSES[stage], []
    original = training.accumulate

    def accumulate(self, *arguments):
        if torch.is_grad_enabled():  # not a measurement on held-out text
            calls.append(None)
        if len(calls) == step * micro_batches and os.environ.get("RANK", "0") == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *arguments)

    training.accumulate = accumulate


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("configs", nargs="+")
    parser.add_argument("--kill", nargs=2)
    parser.add_argument("--until", default=STAGES[-1], help="the last stage to run")
    parser.add_argument("--replicate", action="store_true", help="as if every process were a node of its own")
    options = parser.parse_args()
    if options.replicate:
        os.environ["LOCAL_WORLD_SIZE"] = "1"
    if options.kill:
        kill_at(options.kill[0], int(options.kill[1]))
    compute = None
    for path in options.configs:
        pipeline = Pipeline(make_config(json.loads(Path(path).read_text())), compute)
        compute = pipeline.compute
        for stage in STAGES[: STAGES.index(options.until) + 1]:
            pipeline.run_stage(stage)
