"""Let the models of transformers call hypenet_kernels' ops.

transformers' recurrent layers call functions that are globals of their modeling files, so that replacing the global
reaches every model of the family, those already built too. This is so from transformers 5.16 on.
"""

import functools
import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

from hypenet_kernels.integrations import _call_sites, _norms, _packing

Owner = ModuleType | type[Any]
Functions = dict[str, tuple[Callable[[_call_sites.Site], Callable[..., Any]], str]]

OLDEST = "5.16"
logger = logging.getLogger("hypenet_kernels")

_GATED_DELTA_RULE: Functions = {
    "torch_chunk_gated_delta_rule": (_call_sites.gated_delta_rule, "chunk_gated_delta_rule"),
    "torch_recurrent_gated_delta_rule": (
        _call_sites.gated_delta_step,
        "gated_delta_step, fused_recurrent_gated_delta_rule",
    ),
}
_MAMBA2: Functions = {
    "mamba2_chunk_scan": (_call_sites.mamba2_scan, "chunk_simple_gla"),
    "mamba2_selective_state_update": (_call_sites.mamba2_step, "simple_gla_step, fused_recurrent_simple_gla"),
    "mamba2_split_conv1d_scan_combined": (_call_sites.mamba2_fused, "the separate functions"),
}
_NORMS = (
    (_norms.CENTRED, _norms.centred, "rms_norm_rope"),
    (_norms.PLAIN, _norms.plain, "rms_norm_rope"),
    (_norms.GATED, _norms.gated, "rms_norm_gated"),
)
_CAUSAL_CONV1D: Functions = {
    "causal_conv1d_fn": (_call_sites.causal_conv1d, "causal_conv1d_fn"),
    "causal_conv1d_update": (_call_sites.causal_conv1d_step, "causal_conv1d_update"),
}


@dataclass(frozen=True)
class Family:
    """A modeling file of transformers.

    Attributes:
        name: The package under transformers.models.
        recurrence: "gated_delta_rule", "mamba2", "" for layers that are a convolution alone, None where something that
            is not replaced mixes packed documents (Mamba-1, Kimi delta attention, Inkling's attention).
        model: The class whose forward builds the attention masks; "" where rows cannot be packed.
    """

    name: str
    recurrence: str | None
    model: str = ""


FAMILIES = (
    Family("qwen3_next", "gated_delta_rule", "Qwen3NextModel"),
    Family("qwen3_5", "gated_delta_rule", "Qwen3_5TextModel"),
    Family("qwen3_5_moe", "gated_delta_rule", "Qwen3_5MoeTextModel"),
    Family("olmo_hybrid", "gated_delta_rule", "OlmoHybridModel"),
    Family("qwen4_exp", "gated_delta_rule", "Qwen4ExpTextModel"),
    Family("bamba", "mamba2", "BambaModel"),
    Family("falcon_h1", "mamba2", "FalconH1Model"),
    Family("granitemoehybrid", "mamba2", "GraniteMoeHybridModel"),
    Family("mamba2", "mamba2", "Mamba2Model"),
    Family("nemotron_h", "mamba2", "NemotronHModel"),
    Family("zamba2", "mamba2", "Zamba2Model"),
    Family("lfm2", "", "Lfm2Model"),
    Family("lfm2_moe", "", "Lfm2MoeModel"),
    Family("lfm3", "", "Lfm3Model"),
    Family("inkling", None),
    Family("inkling2", None),
    Family("mamba", None),
    Family("falcon_mamba", None),
    Family("jamba", None),
    Family("zamba", None),
    Family("kimi_linear", None),
    Family("bailing_hybrid", None),
    Family("glm5_next", None),
)


class Replacement(NamedTuple):
    """One thing that a patch replaced: `name` in `module`, now computed `by` these functions of hypenet_kernels."""

    module: str
    name: str
    by: str


class Patch:
    """What `patch_transformers` replaced; a context manager that puts it back at its end.

    Attributes:
        replaced: A `Replacement` for each; `print(patch)` shows them as a table.
    """

    def __init__(self) -> None:
        self.replaced: list[Replacement] = []
        self._held: list[_Place] = []

    def restore(self) -> None:
        """Put the originals back, save those that another patch still holds. A second call does nothing."""
        for place in reversed(self._held):
            place.release()
        self._held.clear()

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *exception: object) -> None:
        self.restore()

    def __str__(self) -> str:
        rows = [("module", "name", "computed by"), *self.replaced]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
        return "\n".join(lines)

    def _hold(self, owner: Owner, name: str, make: Callable[[Any], Any], by: str) -> None:
        place = _places.setdefault((owner, name), _Place(owner, name))
        place.hold(make)
        self._held.append(place)
        module = owner.__name__ if not isinstance(owner, type) else f"{owner.__module__}.{owner.__name__}"
        self.replaced.append(Replacement(module, name, by))


class _Place:
    """An attribute that patches replace together: the first saves the original, the last puts it back."""

    def __init__(self, owner: Owner, name: str) -> None:
        self.owner, self.name, self.holders = owner, name, 0

    def hold(self, make: Callable[[Any], Any]) -> None:
        if self.holders == 0:
            self.original = vars(self.owner)[self.name]
            self.replacement = make(self.original)
            setattr(self.owner, self.name, self.replacement)
        self.holders += 1

    def release(self) -> None:
        self.holders -= 1
        if self.holders > 0:
            return
        if vars(self.owner)[self.name] is self.replacement:
            setattr(self.owner, self.name, self.original)
        else:
            logger.warning("%s.%s was replaced by someone else and stays so", self.owner.__name__, self.name)


_places: dict[tuple[Owner, str], _Place] = {}


def patch_transformers(
    *, gated_delta_rule: bool = True, mamba2: bool = True, causal_conv1d: bool = True, norms: bool = True
) -> Patch:
    """Compute the recurrent layers of transformers' models by this package, until the patch is undone.

    Reaches every installed family and models that are already built: the gated delta rule (Qwen3-Next, Qwen3.5 dense
    and MoE, Olmo-Hybrid, Qwen4), Mamba-2 (Bamba, Falcon-H1, GraniteMoeHybrid, Mamba2, Nemotron-H, Zamba2), and the
    causal convolution of these and of all families that have one. Decoding steps update the cache's states in place.
    The RMSNorms of the families whose recurrence is replaced take one pass each.

    Packed sequences are kept apart however they are named (`cu_seq_lens_q`, `seq_idx`, `position_ids` alone), with
    `use_cache=False` as the default for them; where a layer cannot do it, they raise. On devices other than CPU and
    CUDA, and for what an op does not support, transformers' own function runs, and a warning says so once.

    Args:
        gated_delta_rule: Replace the gated delta rule.
        mamba2: Replace the scan and step of Mamba-2.
        causal_conv1d: Replace the convolution.
        norms: Replace the RMSNorms; without either recurrence this does nothing.
    Returns:
        A `Patch`. Patches nest, and may be undone in any order.
    Raises:
        ImportError: transformers is missing or older than 5.16.
    Example:
        >>> from hypenet_kernels.integrations import patch_transformers
        >>> with patch_transformers() as patch:
        ...     print(patch)                # what was replaced, and by what
        ...     model.generate(**inputs)
        >>> patch = patch_transformers()    # until patch.restore()
    """
    _check_version()
    wanted = {"gated_delta_rule": gated_delta_rule, "mamba2": mamba2}
    patch, before = Patch(), {key for key, place in _places.items() if place.holders}
    try:
        for family in FAMILIES:
            _hold_family(patch, family, wanted, causal_conv1d, norms)
    except BaseException:
        patch.restore()
        raise
    new = {key for key, place in _places.items() if place.holders} - before
    if new:
        logger.info("hypenet_kernels replaced in transformers:\n%s", patch)
    return patch


def _check_version() -> None:
    try:
        transformers = importlib.import_module("transformers")
    except ImportError:
        message = f'patch_transformers: needs transformers; install with: pip install "transformers>={OLDEST}"'
        raise ImportError(message) from None
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if version < tuple(int(part) for part in OLDEST.split(".")):
        raise ImportError(f"patch_transformers: transformers must be at least {OLDEST}, got {transformers.__version__}")


def _modeling_file(family: str) -> ModuleType | None:
    """Return the modeling file of a family, or None where the installed transformers has no such family."""
    name = f"transformers.models.{family}.modeling_{family}"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and name.startswith(error.name):
            return None
        raise


def _hold_family(patch: Patch, family: Family, wanted: dict[str, bool], causal_conv1d: bool, norms: bool) -> None:
    module = _modeling_file(family.name)
    if module is None:
        return
    recurrent = wanted.get(family.recurrence or "", False)
    functions = (_recurrent_functions(family) if recurrent else {}) | (_CAUSAL_CONV1D if causal_conv1d else {})
    for name, (factory, by) in functions.items():
        needs_convolution = name == "mamba2_split_conv1d_scan_combined"
        if name in vars(module) and (causal_conv1d or not needs_convolution):
            patch._hold(module, name, _replacing(factory, module, name, _partner(family, name)), by)
    if recurrent and norms:
        _hold_norms(patch, family, module)
    if family.model and functions:
        _hold_models(patch, family, module)


def _hold_norms(patch: Patch, family: Family, module: ModuleType) -> None:
    for names, factory, by in _NORMS:
        norm = vars(module).get(names.get(family.name, ""))
        if norm is not None:
            patch._hold(norm, "forward", _replacing(factory, module, f"{norm.__name__}.forward", ""), by)


def _recurrent_functions(family: Family) -> Functions:
    return _GATED_DELTA_RULE if family.recurrence == "gated_delta_rule" else _MAMBA2


def _partner(family: Family, name: str) -> str | None:
    """Return the function that must keep documents apart too where `name` does; see `_call_sites.Site`."""
    if not family.recurrence:
        return family.recurrence
    if name in _CAUSAL_CONV1D:
        return next(iter(_recurrent_functions(family)))
    return "causal_conv1d_fn"


def _replacing(
    factory: Callable[[_call_sites.Site], Any], module: ModuleType, name: str, partner: str | None
) -> Callable[[Any], Any]:
    def make(original: Any) -> Any:
        site = _call_sites.Site(module, name, original, partner)
        function = factory(site)
        function.hypenet_site = site
        return function

    return make


def _hold_models(patch: Patch, family: Family, module: ModuleType) -> None:
    """Replace the forward of the classes through which packed documents reach the layers."""
    by = "the same, with packed documents named to every layer"
    finish = {"qwen4_exp": _refuse_ngrams, "granitemoehybrid": _masks_of_documents}.get(family.name)
    model = getattr(module, family.model)
    patch._hold(model, "forward", lambda original: _packing.keep_documents_apart(original, finish), by)
    if family.name == "mamba2":  # its language model drops the keywords that its backbone would read
        passing = functools.partial(_packing.pass_documents_on, backbone="backbone")
        patch._hold(module.Mamba2ForCausalLM, "forward", passing, by)


def _refuse_ngrams(model: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Raise ValueError where embeddings of n-grams, and a convolution of their own, would mix documents."""
    if model.config.ple_layer_ids:
        rule = "be empty for packed sequences, which n-gram embeddings do not keep apart"
        raise ValueError(f"{type(model).__name__}: config.ple_layer_ids must {rule}, got {model.config.ple_layer_ids}")
    return {}


def _masks_of_documents(model: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the attention mask that keeps documents apart, for a model that makes its own without position_ids."""
    from transformers.masking_utils import create_causal_mask

    positions = arguments["position_ids"]
    B, T = arguments["seq_idx"].shape
    embeddings = model.get_input_embeddings().weight.new_empty(B, T, 1)
    mask = create_causal_mask(
        config=model.config, inputs_embeds=embeddings, attention_mask=None, past_key_values=None, position_ids=positions
    )
    flash_attention = {"cu_seq_lens_k": arguments["cu_seq_lens_q"], "max_length_q": T, "max_length_k": T}
    return {"attention_mask": {"full_attention": mask, "linear_attention": None}} | flash_attention
