"""Weight transfer (HALO, 4.1): a recurrent twin of every attention layer, from the layer's own projections.

Leaves mixers.safetensors, the twins' weights in float32; everything else of the student is the teacher's.
"""

import torch

from halo import files, models
from halo.job import Job


def run(job: Job) -> None:
    """Build the twins and save them."""
    torch.manual_seed(job.config.seed)
    twins = models.make_twins(job.load_teacher_weights(), job.config.mixer, **job.config.architecture)
    if job.compute.main:
        models.save_mixers(twins.state_dict(), job.directory("transfer") / files.MIXERS)
