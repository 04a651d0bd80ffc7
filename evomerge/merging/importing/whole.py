"""Quantised models that transformers loads and dequantises as a whole, e.g. GGUF, GPTQ, AWQ, bitsandbytes."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

from evomerge.errors import ModelError
from evomerge.merging.sources.model_config import model_class

PACKAGES = {
    "gguf": "gguf",
    "gptq": "gptqmodel",
    "awq": "gptqmodel",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "hqq": "hqq",
    "torchao": "torchao",
    "quanto": "optimum-quanto",
}
"""Formats and the package that transformers reads them with."""


def convert(folder: Path, out: Path, dtype: str, *, gguf: str = "") -> None:
    """Load a model with transformers, dequantise it, and save it. gguf: the file's name in the folder.

    Raises ModelError where transformers can't.
    """
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    kwargs: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    method = "gguf" if gguf else _method(folder)
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if gguf:
                model = AutoModelForCausalLM.from_pretrained(
                    folder, gguf_file=gguf, dtype=getattr(torch, dtype), **kwargs
                )
                AutoTokenizer.from_pretrained(folder, gguf_file=gguf, **kwargs).save_pretrained(out)
            else:
                config = AutoConfig.from_pretrained(folder, **kwargs)
                settings = _dequantising(method)
                model = model_class(config).from_pretrained(
                    folder, dtype=getattr(torch, dtype), **kwargs, **settings
                )
                if getattr(model, "is_quantized", False):
                    model = model.dequantize()
            model = model.to(getattr(torch, dtype))
            model.hf_quantizer = None  # what follows are float weights, which it would not save
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            _forget_dequantising(model)
            model.save_pretrained(out)
    except Exception as error:  # each format's package raises errors of its own
        package = PACKAGES.get(method)
        raise ModelError(
            f"{folder / gguf if gguf else folder}: transformers can't read this {method} model",
            got=" ".join(str(error).split())[:300],
            fix=f"pip install {package}" if package and _missing(package) else "take a float version of it",
        ) from None


def _method(folder: Path) -> str:
    data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return str((data.get("quantization_config") or {}).get("quant_method"))


def _forget_dequantising(model: Any) -> None:
    """Take out of what transformers would undo on saving what has no way back: how weights were unpacked."""
    kept = []
    for conversion in getattr(model, "_weight_conversions", None) or ():
        try:
            conversion.reverse_transform()
        except NotImplementedError:
            continue
        kept.append(conversion)
    model._weight_conversions = kept or None


def _dequantising(method: str) -> dict[str, Any]:
    """Return what makes transformers compute float weights while it loads, where it can."""
    import transformers

    names = {"fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config"}
    if method in names:
        return {"quantization_config": getattr(transformers, names[method])(dequantize=True)}
    if method == "compressed-tensors":
        return {"quantization_config": transformers.CompressedTensorsConfig(run_compressed=False)}
    return {}


def _missing(package: str) -> bool:
    import importlib.util

    module = {"optimum-quanto": "optimum"}.get(package, package.replace("-", "_"))
    return importlib.util.find_spec(module) is None
