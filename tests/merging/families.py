"""Tiny random models of the families that the installed transformers has, and what becomes of their merges.

    python -m tests.merging.families --write docs/families.md

Every family in transformers' automatic classes for text is tried: a random base of a few thousand weights,
two models near it, and merges of them. Families that can't be built as tiny models are listed.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import re
import signal
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from evomerge.errors import UserError
from evomerge.merging.compatibility import check
from evomerge.merging.export.writer import write
from evomerge.merging.live.workbench import Workbench
from evomerge.merging.modules import beside_text
from evomerge.merging.recipe import Recipe, TensorGroup
from evomerge.merging.sources.checkpoint import Checkpoint
from evomerge.merging.sources.model_config import COUNTS, model_class, text_part
from evomerge.merging.tensors.digest import folder_digest

IDS = torch.arange(3, 13)[None]
LARGEST = 30_000_000
"""Number of weights from which a family counts as not built: its config has sizes that are not known here."""
SECONDS = 120
"""Time for one family."""

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "lru_width", "attention_hidden_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    "num_key_value_heads": 2,
    "head_dim": 8,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_size"), 16),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    "expert_ffn_hidden_size": 16,
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "v_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 4),
    "sliding_window": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
    "mamba_expand": 2,
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_n_groups", "n_groups"), 1),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank", "conv_kernel", "d_conv"), 4),
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "index_topk": 4,
    "chunk_size": 8,
}
"""Sizes of a tiny text decoder, by the names that configs have for them."""
TOWER: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "embed_dim", "out_hidden_size", "projection_dim", "output_dim"), 32),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "depth", "encoder_layers"), 3),
    **dict.fromkeys(("num_heads", "num_attention_heads", "encoder_attention_heads"), 4),
    "image_size": 28,
    "patch_size": 14,
    "num_channels": 3,
    "head_dim": 8,
    "d_model": 32,
    "num_mel_bins": 16,
    "vocab_size": 64,
}
"""The same of a tower for images or sound."""
LATENT = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 4}
SECTIONS = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
HYBRID = {"layer_types": ["linear_attention", "full_attention"] * 2}
SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("deepseek_v3", "deepseek_v32", "axk1", "axk2", "kimi_k25", "dots3_note_text"), LATENT),
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": LATENT,
    "youtu": LATENT,
    "glm_moe_dsa": LATENT | {"qk_rope_head_dim": 8, "index_head_dim": 16},
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "zaya": {"num_experts_per_tok": 1},
    "xlstm": {"num_heads": 4, "qk_dim_factor": 1.0},
    "qwen2_vl": SECTIONS,
    "qwen2_5_vl": SECTIONS,
    "paddleocr_vl": SECTIONS,
    "qwen2_5_omni_thinker": SECTIONS,
    **dict.fromkeys(("glm4v", "glm4v_moe", "glm46v", "glm_ocr", "glmga"), SECTIONS),
    "reformer": {"is_decoder": True},
}
"""What a family's tiny text decoder needs beyond `SIZES`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What became of a family.

    outcome: "merged", "refused" (by us, with a message), "differs", or "not built" (as a tiny model).
    modules: those beside the text decoder. note: the message, or what differs.
    """

    family: str
    built: str = ""
    outcome: str
    modules: tuple[str, ...] = ()
    layers: int = 0
    note: str = ""


def names() -> list[str]:
    """Return the model types of all families that answer in text."""
    maps = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM")
    found = [name for key in maps for name in getattr(modeling_auto, f"MODEL_FOR_{key}_MAPPING_NAMES")]
    return list(dict.fromkeys(found))


def build(family: str, seed: int) -> Any:
    """Return a tiny random model; seeds after 0 are near seed 0."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = _config(family)
        described = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(family)
        config.architectures = None if described is None else [described]
        with torch.device("meta"):
            weights = sum(p.numel() for p in model_class(config).from_config(config).parameters())
        if weights > LARGEST:
            raise ValueError("its config has sizes of its own")
        model = model_class(config).from_config(copy.deepcopy(config))
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.data += torch.randn(parameter.shape) * (0.01 if seed else 0.05)
    return model.eval()


def _config(family: str) -> Any:
    kind = CONFIG_MAPPING[family]
    parts = getattr(kind, "sub_configs", None) or {}
    special = SPECIAL.get(family, {})
    if "text_config" not in parts:
        return kind(**_known(kind, SIZES) | special)
    defaults = kind()
    changes: dict[str, Any] = {}
    for name, declared in parts.items():
        part = type(getattr(defaults, name)) if getattr(defaults, name, None) is not None else declared
        if part.__name__ != "AutoConfig":
            sizes = _known(part, SIZES) | special if name == "text_config" else _known(part, TOWER)
            changes[name] = sizes | {"model_type": part.model_type}
    return kind(**changes)


def _known(kind: Any, sizes: dict[str, Any]) -> dict[str, Any]:
    """Return the sizes that a config class has."""
    try:
        keys = set(kind().to_dict())
    except Exception:  # some defaults are not valid by themselves
        keys = set()
    renamed = getattr(kind, "attribute_map", None) or {}
    keys |= set(renamed)
    keys |= {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    return {k: v for k, v in sizes.items() if k in keys and not (k in renamed and renamed[k] in sizes)}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def tried(family: str, folder: Path) -> Result:
    """Merge tiny models of a family in several ways, and say what became of it."""
    try:
        with limited(SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logits(build(family, 0))
            for seed, name in enumerate(("base", "a", "b")):
                model = build(family, seed)
                model.save_pretrained(folder / name)
            again = type(model).from_pretrained(folder / "b", dtype=torch.float32).eval()
            if not torch.allclose(logits(model), logits(again), rtol=1e-5, atol=1e-6):
                raise ValueError("transformers loads other weights than it saved")
    except Exception as error:  # whatever a config or a model raises
        return Result(family=family, outcome="not built", note=_short(error))
    models = {name: str(folder / name) for name in ("base", "a", "b")}
    built = type(model).__name__
    try:
        with limited(SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            source = Checkpoint.open(models["base"])
            differences = list(_differences(models, folder))
            modules = beside_text(source.headers)
    except UserError as error:
        return Result(family=family, built=built, outcome="refused", note=_short(error))
    return Result(
        family=family,
        built=built,
        outcome="differs" if differences else "merged",
        modules=modules,
        layers=source.num_layers,
        note="; ".join(differences),
    )


def _differences(models: dict[str, str], folder: Path) -> Iterator[str]:
    """Yield what is wrong with the merges of three models."""
    bench = Workbench(models, "base")
    text = model_config_layers(Path(models["base"]))
    if text is not None and bench.sources["base"].num_layers != text:
        yield f"{bench.sources['base'].num_layers} layers, not {text}"
    for method, parameters in (
        ("linear", {}),
        ("task_arithmetic", {"weight": (0.5, 0.7)}),
        ("ties", {"weight": (0.5, 0.7), "density": (0.4, 0.4)}),
    ):
        group = TensorGroup(method=method, sources=("a", "b"), parameters=parameters)
        recipe = Recipe(models=models, base="base", groups=(group,), dtype="float32")
        check(recipe, bench.sources)
        bench.load(recipe)
        out = write(recipe, folder / method)
        if bench.digest(recipe) != folder_digest(out, "float32"):
            yield f"{method}: live and written weights differ"
        kind = model_class(transformers.AutoConfig.from_pretrained(out))
        model, info = kind.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
        if lost := [key for name in ("missing_keys", "unexpected_keys") for key in info[name]]:
            yield f"{method}: {', '.join(lost[:2])} when loaded"
        live, loaded = logits(bench.model), logits(model.eval())
        if not torch.allclose(live, loaded, rtol=1e-5, atol=1e-6):
            yield f"{method}: logits of the live and the loaded model differ"
        made = Checkpoint.open(str(out))
        if made.headers.keys() != bench.sources["base"].headers.keys():
            yield f"{method}: other tensors than the base"
        if method == "linear":
            yield from _left(bench, made)


def _left(bench: Workbench, made: Checkpoint) -> Iterator[str]:
    """Yield the tensors that are not the mean of the sources'."""
    for name in made.headers:
        mean = (bench.sources["a"].tensor(name) + bench.sources["b"].tensor(name)) / 2
        if not torch.allclose(made.tensor(name), mean, rtol=1e-5, atol=1e-6):
            yield f"{name} is not merged"


def model_config_layers(folder: Path) -> int | None:
    """Return the number of layers that config.json says, if it does."""
    text = text_part(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    return next((text[key] for key in COUNTS if text.get(key)), None)


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise TimeoutError where the body takes longer."""

    def late(*_: object) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _short(error: BaseException) -> str:
    text = re.sub(r"/\S*/base", "base", " ".join(str(error).split()))[:200]
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


PAGE = """\
# Model families

Tiny random models of every family that answers in text, of transformers {version}: a base and two models near
it, merged by `linear`, `task_arithmetic` and `ties`. *Merged* means: no tensor is left out or unmerged; the
live, the written and the loaded model have the same weights in every bit and the same logits; and layers are
counted as the config counts them. Logits are compared to 1e-5, because in a few families, such as Mamba, the
products of so small matrices depend on the address of an intermediate result. This page is written by
`python -m tests.merging.families --write docs/families.md`.

{merged} families merge, {refused} are refused, {differs} differ somewhere. {missed} could not be built as
tiny models (their configs need sizes of their own, or a package is missing), which says nothing about them.

| family | class | result | modules beside the text decoder |
|---|---|---|---|"""


def table(results: list[Result]) -> str:
    """Return the page docs/families.md."""
    counts = {o: sum(r.outcome == o for r in results) for o in ("merged", "refused", "differs", "not built")}
    missed = counts.pop("not built")
    lines = PAGE.format(version=transformers.__version__, missed=missed, **counts).splitlines()
    order = {"merged": 0, "differs": 1, "refused": 2}
    for r in sorted(results, key=lambda r: (order.get(r.outcome, 3), r.family)):
        if r.outcome != "not built":
            what = r.outcome if r.outcome == "merged" else f"{r.outcome}: {r.note}".replace("|", "\\|")
            lines.append(f"| `{r.family}` | {r.built} | {what} | {', '.join(r.modules)} |")
    rest = ", ".join(f"`{r.family}`" for r in results if r.outcome == "not built")
    return "\n".join([*lines, "", f"Not built: {rest}.", ""])


def main() -> None:
    """Try all families, or those that are named, and print or write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*")
    parser.add_argument("--write", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    results = []
    for family in asked.families or names():
        with tempfile.TemporaryDirectory() as folder:
            results.append(tried(family, Path(folder)))
        print(results[-1].family, results[-1].outcome, results[-1].note, flush=True)
    if asked.write:
        asked.write.write_text(table(results), encoding="utf-8")


if __name__ == "__main__":
    main()
