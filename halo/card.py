"""The model card of an exported model: README.md with the run's own numbers."""

import re
from pathlib import Path
from typing import Any

import yaml

from halo import files
from halo.report import evaluation_table, every_digit, read_record
from halo.stages import TRAINED_STAGES
from hypenet import HypeNetForCausalLM
from hypenet.configuration_hypenet import GDN, LIGHTNING, MAMBA2, SOFTMAX

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
FILES = (".gguf", ".txt", ".md", ".rst", ".json", ".jsonl", ".parquet", ".gz", ".zst")
KINDS = {SOFTMAX: "softmax attention", LIGHTNING: "Lightning attention", GDN: "gated DeltaNet", MAMBA2: "Mamba2"}
PAPER = "[arXiv 2601.22156](https://arxiv.org/abs/2601.22156)"


def model_card(run: Path, model: HypeNetForCausalLM, license_name: str, name: str) -> str:
    """Return the model card of a run's finished model. Directories of the run are not named.

    Args:
        run: Directory of the conversion.
        model: The model.
        license_name: Identifier of its license.
        name: Of the folder or the repository, for the examples.

    Raises:
        HaloError: If a file of the run is damaged.
    """
    path = run / files.CONFIG
    with files.reading(path, "run a stage of the conversion again"):
        config: dict[str, Any] = yaml.safe_load(path.read_text("utf-8"))
        teacher, sources = str(config["teacher"]), _sources(config["data"]["source"])
        stages = _stage_table(run, config)
    results = read_record(run / "eval" / files.RESULTS)
    sections = [
        _front_matter(teacher, sources, license_name),
        f"# HypeNet from {_public(teacher)}\n",
        f"A hybrid of softmax attention and linear recurrences, converted from {_public(teacher)} by HALO ({PAPER}) "
        "with the package hypenet.\n",
        _model_section(model),
        f"## Training\n\n{stages}\n\nText: {', '.join(sources)}.\n",
        "" if results is None else f"## Evaluation\n\n{evaluation_table(results['rows'])}",
        _use_section(name, model.config.max_position_embeddings),
        f"## License\n\n{_license(license_name)}\n",
    ]
    return "\n".join(section for section in sections if section)


def _front_matter(teacher: str, sources: list[str], license_name: str) -> str:
    fields: dict[str, Any] = {"license": license_name, "library_name": "transformers"}
    fields |= {"pipeline_tag": "text-generation", "tags": ["hypenet", "linear-attention", "hybrid"]}
    if _is_hub_name(teacher):
        fields["base_model"] = teacher
    if datasets := [source for source in sources if _is_hub_name(source)]:
        fields["datasets"] = datasets
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---\n"


def _model_section(model: HypeNetForCausalLM) -> str:
    config = model.config
    lines = ["## Model\n", f"- {model.num_parameters():,} parameters, {str(model.dtype).removeprefix('torch.')}"]
    for kind in dict.fromkeys(config.mixers):
        layers = [str(i) for i, mixer in enumerate(config.mixers) if mixer == kind]
        lines.append(f"- {KINDS[kind]} in {len(layers)} of {config.num_hidden_layers} layers: {', '.join(layers)}")
    if config.logit_scale_base is not None:
        base = every_digit(config.logit_scale_base)
        lines.append(f"- attention scale ln(t + {base}) / ln({base}) at position t")
    lines.append(
        f"- per sequence {config.cache_bytes_per_token():,} bytes of keys and values for each token (bfloat16) and "
        f"{config.state_bytes():,} bytes of state"
    )
    return "\n".join([*lines, ""])


def _stage_table(run: Path, config: dict[str, Any]) -> str:
    rows, total = [], 0
    for stage in TRAINED_STAGES:
        directory = run / stage
        if stage == "align" and config["aligned"]:
            other = Path(config["aligned"])
            directory = other / stage if (other / stage).is_dir() else other
        settings, lines = config[stage], files.read_lines(directory / files.METRICS)
        steps = lines[-1]["step"] if lines else 0
        tokens = steps * settings["batch"] * settings["length"]
        total += tokens
        loss = f"{lines[-1]['loss']:.4g}" if lines else "not trained"
        rows.append(f"| {stage} | {steps:,} | {tokens:,} | {settings['length']:,} | {loss} |")
    head = ["| stage | steps | tokens | sequence length | last loss |", "|---|" + "---:|" * 4]
    return "\n".join([*head, *rows, "", f"{total:,} tokens in all."])


def _use_section(name: str, length: int) -> str:
    return f"""## Use

```
pip install "hypenet[model]"
```

```python
import hypenet  # registers the model with transformers; or pass trust_remote_code=True
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

Programs that do not import hypenet need trust_remote_code, which loads the same classes from the installed package:

```
lm_eval --model hf --model_args pretrained={name},trust_remote_code=True,dtype=bfloat16 --tasks lambada_openai
```

`max_position_embeddings` is {length:,}. The model itself has no limit.
"""


def _license(license_name: str) -> str:
    if license_name == "unknown":
        return "Not stated (`halo export --license`). That of the original model applies to what is derived from it."
    return license_name


def _sources(source: Any) -> list[str]:
    """Return the names of the text's sources that mean something elsewhere."""
    entries = source if isinstance(source, list) else [source]
    names = [_public(str(entry["source"] if isinstance(entry, dict) else entry), "local files") for entry in entries]
    return list(dict.fromkeys(names))


def _public(name: str, local: str | None = None) -> str:
    """Return a name as it is if it is one of the Hub or of the package, else `local`, or its last part."""
    if _is_hub_name(name):
        return name
    if name == "stdlib":
        return "the text of Python's standard library"
    if "/" in name or "*" in name or name.endswith(FILES) or Path(name).exists():
        return local or Path(name).name
    return name


def _is_hub_name(name: str) -> bool:
    return HUB_NAME.fullmatch(name) is not None and not name.endswith(FILES) and not Path(name).exists()
