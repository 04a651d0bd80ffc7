"""Kinds of the files in a model's folder, by their names: a tokenizer's, weights, and what no merge needs."""

from __future__ import annotations

from fnmatch import fnmatch

TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model*",
    "spiece.model",
    "*.bpe.model",
    "sentencepiece*.model",
    "tekken.json",
    "*.tiktoken",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
"""Names of files that hold a tokenizer's tokens."""
TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
WRITTEN = (
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "recipe.yaml",
    "mergekit*.yaml",
    "mergekit*.yml",
    "README.md",
    ".git*",
    ".cache",
    ".huggingface",
    ".DS_Store",
    "__pycache__",
    "adapter_config.json",
)
"""Names that a merge writes itself, or that are of no use in it; nothing is said of them."""
LEFT_OUT = (
    ".*",
    "*.safetensors",
    *("*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.ggml", "*.onnx", "*.onnx_data", "*.msgpack", "*.h5"),
    *("*.pkl", "*.pickle", "*.npz", "*.npy", "*.ot", "*.tflite", "*.mlmodel", "*.nemo", "*.tar*", "*.zip"),
    *("*.index.json", "optimizer*", "scheduler*", "rng_state*", "scaler*", "trainer_state.json"),
    *("training_args.*", "events.out.tfevents*", "*.lock", "*.incomplete", "*.tmp", "*.log"),
    *("onnx", "original", "openvino", "coreml", "checkpoint-*", "global_step*", "runs", "wandb", "mlruns"),
    "adapter_model*",
)
"""Names of weights, states of trainings and caches, of files and folders."""
LARGEST = 64_000_000
"""Bytes of a file that is no tokenizer's and still taken over."""


def is_tokenizers(name: str) -> bool:
    """Say whether a file of a model's folder is its tokenizer's or a chat template.

    >>> is_tokenizers("tekken.json"), is_tokenizers("preprocessor_config.json")
    (True, False)
    """
    return matches(name.split("/", maxsplit=1)[0], (*TOKENIZER, *TOKENIZER_SETTINGS, *TEMPLATES))


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Say whether a name fits one of some patterns."""
    return any(fnmatch(name, pattern) for pattern in patterns)
