"""Names of tensors in a live model, for files whose names transformers changes when it loads them.

An adapter is saved with the names of the live model, or of an older transformers. In models with several
modules, such as vision and language models, these are not the names in the base's files.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from evomerge.errors import ModelError
from evomerge.merging.sources.model_config import model_class


class LiveNames:
    """Finds a tensor of a model's files by any of its names.

    folder: the model's. tensors: the names in its files. A model is built, without memory for its weights,
    once a name is asked for that is not in the files.
    """

    def __init__(self, folder: Path, tensors: frozenset[str]) -> None:
        self._folder, self._tensors = folder, tensors

    def file_name(self, name: str) -> str | None:
        """Return the name in the files, or None if no tensor is called so."""
        if name in self._tensors:
            return name
        live, renamed = self._renamings
        return live.get(name) or live.get(renamed(name))

    def live_name(self, tensor: str) -> str:
        """Return the name that a tensor of the files has in the live model."""
        return self._renamings[1](tensor)

    @functools.cached_property
    def _renamings(self) -> tuple[dict[str, str], Callable[[str], str]]:
        import torch
        from transformers import AutoConfig
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key

        try:
            config = AutoConfig.from_pretrained(self._folder, local_files_only=True, trust_remote_code=False)
            with torch.device("meta"):
                model = model_class(config).from_config(config, trust_remote_code=False)
        except Exception as error:  # transformers computes with the config before it checks it
            raise ModelError(
                f"{self._folder}: transformers can't build this model", got=" ".join(str(error).split())[:300]
            ) from None
        mapping = get_model_conversion_mapping(model)
        renamings = [conversion for conversion in mapping if isinstance(conversion, WeightRenaming)]
        state = model.state_dict()

        def renamed(name: str) -> str:
            return str(rename_source_key(name, renamings, [], model.base_model_prefix, state)[0])

        return {renamed(name): name for name in self._tensors}, renamed
