"""Tasks of lm-evaluation-harness on a loaded model; needs the extra `eval`."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halo.extras import require
from halo.settings import HaloError


class Harness:
    """Tasks of lm-evaluation-harness.

    Args:
        tasks: Names of tasks, groups or tags, or YAML files of tasks.
        folder: Where the model's tokenizer can be loaded from, for tasks that make prompts of a length.
        lengths: Lengths for those tasks (RULER's niah_*); the longest is also the largest context of all tasks.

    Raises:
        HaloError: If the extra is not installed, or a task does not exist.
    """

    def __init__(self, tasks: list[str], folder: str, lengths: list[int]) -> None:
        try:
            require("eval", "eval", "lm_eval")
        except ModuleNotFoundError as error:
            named = (
                f"eval: {', '.join(tasks)}: must be among {', '.join(own_tasks())} or tasks of lm-evaluation-harness"
            )
            raise HaloError(f"{named}, which {str(error).removeprefix('eval: ')}") from None
        from lm_eval.tasks import TaskManager

        self.tasks, self.lengths = tasks, lengths
        self.metadata = {"tokenizer": folder, "max_seq_lengths": lengths}
        self.manager = TaskManager(metadata=self.metadata)
        unknown = [name for name in tasks if not Path(name).is_file() and not self.manager.match_tasks([name])]
        if unknown:
            raise HaloError(
                f"eval: tasks must be among {', '.join(own_tasks())} or known to lm-evaluation-harness, "
                f"got {unknown[0]}"
            )

    def rows(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = 1,
        limit: int | None = None,
        num_fewshot: int | None = None,
    ) -> list[dict[str, Any]]:
        """Run the tasks.

        Args:
            model: The model.
            tokenizer: Its tokenizer.
            batch_size: Sequences per forward pass.
            limit: Samples per task; None for all.
            num_fewshot: Examples in the prompt; None for the task's own number.

        Returns:
            A row for each task and metric: task, length (for niah_*), metric, value, error (None if there is none),
            samples.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        longest = max([getattr(model.config, "max_position_embeddings", 0), *self.lengths])
        found = simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=longest),
            tasks=list(self.tasks),
            task_manager=self.manager,
            limit=limit,
            num_fewshot=num_fewshot,
            log_samples=False,
            metadata=self.metadata,
        )
        return [row for name, metrics in found["results"].items() for row in _rows(name, metrics, found, self.lengths)]


def own_tasks() -> tuple[str, ...]:
    """Return the names of the tasks that need no package."""
    from halo.evaluation.ruler import KINDS

    return ("recall", "bits", *KINDS)


def _rows(name: str, metrics: dict[str, Any], found: dict[str, Any], lengths: list[int]) -> list[dict[str, Any]]:
    rows = []
    samples = found.get("n-samples", {}).get(name, {}).get("effective")
    for key, value in metrics.items():
        metric, separator, variant = key.partition(",")
        # niah_* have a metric for each length that they know, of which only those asked for were measured.
        measured = not metric.isdigit() or int(metric) in lengths
        if separator and measured and not metric.endswith("_stderr") and isinstance(value, (int, float)):
            error = metrics.get(f"{metric}_stderr,{variant}")
            rows.append(
                {
                    "task": name,
                    "length": int(metric) if metric.isdigit() else None,
                    "metric": metric if variant == "none" else f"{metric} ({variant})",
                    "value": float(value),
                    "error": float(error) if isinstance(error, (int, float)) else None,
                    "samples": samples,
                }
            )
    return rows
