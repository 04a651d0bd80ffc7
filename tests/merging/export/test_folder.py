"""What is written opens in older and newer transformers and peft, and answers with the same tokens.

    pytest -m slow tests/merging/export/test_folder.py

Every row of `VERSIONS` is installed with pip into an environment of its own, which shares all other packages
with the present one. Without a package registry the tests are skipped.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest
import torch

from evomerge.merging.export.adapter import write_adapter
from evomerge.merging.export.writer import write
from evomerge.merging.recipe import Recipe, TensorGroup
from tests.merging.conftest import WORDS, llama, perturb, save

VERSIONS = {
    "4.52": ("transformers==4.52.4", "tokenizers==0.21.4", "huggingface_hub==0.36.*", "peft==0.15.2"),
    "4.57": ("transformers==4.57.*", "tokenizers==0.22.1", "huggingface_hub==0.36.*", "peft==0.18.*"),
    "newest": ("transformers", "tokenizers", "huggingface_hub", "peft"),
}
ROPE = {
    "rope_type": "llama3",
    "rope_theta": 300.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
"""Older versions have these under other names; wrong ones change the answers below."""
OPENS = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, adapter = sys.argv[1], sys.argv[2:]
options = {"torch_dtype": "auto"} if transformers.__version__.startswith("4") else {}
model = AutoModelForCausalLM.from_pretrained(folder, **options)
tokenizer = AutoTokenizer.from_pretrained(folder)
dtype = str(model.dtype)
if adapter:
    import peft
    model = peft.PeftModel.from_pretrained(model, adapter[0])
turns = [{"role": "user", "content": "w1 w7 w3 <|im_end|> w11"}]
prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
ids = tokenizer(prompt, return_tensors="pt").input_ids
model = model.to(torch.float32).eval()
ends = model.generation_config.eos_token_id
with torch.no_grad():
    known = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    done = model.generate(**known, max_new_tokens=16, do_sample=False)
    best = model(input_ids=ids).logits[0].argmax(-1)
print("RESULT", json.dumps([dtype, prompt, done.tolist(), best.tolist(), ends]))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Name -> arguments of the script: a merge under `base`, one under `union`, and an adapter on a base."""
    place = tmp_path_factory.mktemp("folders")
    made = {}
    for seed, (name, added) in enumerate(
        {"base": [], "chat": ["<|im_start|>", "<|im_end|>"], "tuned": []}.items(), start=1
    ):
        words = [*WORDS, *added]
        changes = {"vocab_size": len(words), "rope_parameters": ROPE, "tie_word_embeddings": False}
        model = perturb(llama(**changes), seed, 0.8)
        save(model, place / name, words)
        made[name] = str(place / name)
    tokenizer = Path(made["chat"]) / "tokenizer_config.json"
    data = json.loads(tokenizer.read_text()) | {"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    tokenizer.write_text(json.dumps(data))
    both = TensorGroup(method="linear", sources=("base", "chat"))
    models = {name: made[name] for name in ("base", "chat")}
    arguments = {}
    for chosen in ("base", "union", "chat"):
        recipe = Recipe(models=models, base="base", groups=(both,), tokenizer=chosen, chat_template="chatml")
        arguments[chosen] = [str(write(recipe, place / f"merged-{chosen}"))]
    copy = Recipe.copy_of(made["base"], dtype="bfloat16")
    base = str(write(Recipe(models=copy.models, groups=copy.groups, chat_template="chatml"), place / "copy"))
    change = TensorGroup(method="task_arithmetic", sources=("tuned",), parameters={"weight": 0.5})
    recipe = Recipe(models={"base": base, "tuned": made["tuned"]}, base="base", groups=(change,))
    write_adapter(recipe, place / "adapter", rank=4)
    arguments["adapter"] = [base, str(place / "adapter")]
    return arguments


def opened(python: Path | str, arguments: list[str]) -> list[Any]:
    done = subprocess.run([str(python), "-c", OPENS, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.partition("RESULT")[2])  # type: ignore[no-any-return]


@pytest.fixture(scope="module", params=VERSIONS)
def python(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with other versions."""
    place = tmp_path_factory.mktemp("environment")
    venv.create(place, with_pip=True)
    (site,) = place.glob("lib/*/site-packages")
    shared = {str(Path(module.__file__).parent.parent) for module in (torch, pytest) if module.__file__}
    (site / "shared.pth").write_text("\n".join(sorted(shared)))
    interpreter = place / "bin" / "python"
    install = [str(interpreter), "-m", "pip", "install", "-q", "--no-deps", "--ignore-installed"]
    done = subprocess.run([*install, *VERSIONS[request.param]], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no package registry: {done.stderr[-300:]}")
    names = "import transformers, peft; print(transformers.__version__, peft.__version__)"
    found = subprocess.run([str(interpreter), "-c", names], capture_output=True, text=True, check=False)
    print(found.stdout or found.stderr[-500:])
    return interpreter


@pytest.mark.slow
def test_other_versions_give_the_same_tokens(python: Path, folders: dict[str, list[str]]) -> None:
    for name, arguments in folders.items():
        here = opened(sys.executable, arguments)
        assert here[0] == "torch.bfloat16"
        assert len(set(here[3])) > 3, "answers of one token would show nothing"
        assert opened(python, arguments) == here, name


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
def test_vllm_opens_a_merged_folder(folders: dict[str, list[str]]) -> None:
    from vllm import LLM, SamplingParams

    (folder,) = folders["union"]
    here = opened(sys.executable, [folder])
    llm = LLM(model=folder, dtype="float32", max_model_len=128, enforce_eager=True)
    assert llm.llm_engine.model_config.dtype == torch.float32
    done = llm.generate([here[1]], SamplingParams(temperature=0.0, max_tokens=16))
    prompt = len(done[0].prompt_token_ids)
    assert list(done[0].outputs[0].token_ids) == here[2][0][prompt:]


def test_a_tokenizer_of_version_5_is_written_for_both(tmp_path: Path) -> None:
    for name, added in {"base": [], "chat": ["<|im_end|>"]}.items():
        save(llama(vocab_size=len(WORDS) + len(added)), tmp_path / name, [*WORDS, *added])
        path = tmp_path / name / "tokenizer_config.json"
        data = json.loads(path.read_text())
        assert data["tokenizer_class"] == "TokenizersBackend"
        path.write_text(json.dumps(data | {"extra_special_tokens": ["w5"]}))
    models = {name: str(tmp_path / name) for name in ("base", "chat")}
    both = TensorGroup(method="linear", sources=("base", "chat"))
    for tokenizer in ("base", "union"):
        out = write(
            Recipe(models=models, base="base", groups=(both,), tokenizer=tokenizer),
            tmp_path / f"out-{tokenizer}",
        )
        data = json.loads((out / "tokenizer_config.json").read_text())
        assert data["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert data["additional_special_tokens"] == ["w5"]
        assert not {"extra_special_tokens", "is_local", "local_files_only"} & data.keys()


def test_a_class_of_both_versions_stays(tmp_path: Path) -> None:
    for name, added in {"base": [], "chat": ["<|im_end|>"]}.items():
        save(llama(vocab_size=len(WORDS) + len(added)), tmp_path / name, [*WORDS, *added])
        path = tmp_path / name / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "GPT2TokenizerFast"}))
    models = {name: str(tmp_path / name) for name in ("base", "chat")}
    both = TensorGroup(method="linear", sources=("base", "chat"))
    recipe = Recipe(models=models, base="base", groups=(both,), tokenizer="base")
    written = json.loads((write(recipe, tmp_path / "out") / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "GPT2TokenizerFast"


def test_parts_of_a_config_name_the_type_and_the_rotation_twice() -> None:
    from evomerge.merging.export.folder import readable, with_ends
    from evomerge.merging.sources.chat import Chat

    asking = Chat(templates={}, generation={"eos_token_id": [2, 7]})
    ended = with_ends({"text_config": {"num_hidden_layers": 2, "eos_token_id": 2}}, asking)
    assert ended == {"text_config": {"num_hidden_layers": 2, "eos_token_id": [2, 7]}}
    rope = {"rope_type": "default", "rope_theta": 5e5}
    config = {
        "text_config": {"num_hidden_layers": 2, "rope_parameters": rope},
        "vision_config": {"dtype": "float32"},
        "audio_config": {"torch_dtype": "float32"},
        "other": {"depth": 1},
    }
    assert readable(config, "bfloat16") == {
        "text_config": {
            **config["text_config"],
            "rope_theta": 5e5,
            "dtype": "bfloat16",
            "torch_dtype": "bfloat16",
        },
        "vision_config": {"dtype": "bfloat16", "torch_dtype": "bfloat16"},
        "audio_config": {"dtype": "bfloat16", "torch_dtype": "bfloat16"},
        "other": {"depth": 1},
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }
    assert readable({"rope_parameters": ROPE}, "float16")["rope_scaling"] == {
        key: value for key, value in ROPE.items() if key != "rope_theta"
    }
    by_kind = {"rope_parameters": {"full_attention": rope}}  # version 4 has no name for these
    assert readable(by_kind, "float16").keys() == {"rope_parameters", "dtype", "torch_dtype"}
