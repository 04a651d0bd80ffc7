"""Show that a layer path makes a skill that no parent has: a zoo trained from scratch, then one search.

    python benchmarks/perf/layer_path.py FOLDER        # some minutes on one core; prints what LOG.md shows

Every model reverses five letters. The base answers in the alphabet of the question. Then layers are trained
apart, all else frozen: the first two read a cipher, the last two write another alphabet.

              first two layers read          last two layers write
    reads     the cipher                     numbers, whatever is asked
    writes    another meaning of the cipher  capitals, whatever is asked

Wanted: cipher in, capitals out. `reads` understands the question and answers in numbers, `writes` answers
in capitals and misunderstands the question, and an average of both understands and writes neither.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from evomerge import compose
from evomerge.config import RunConfig
from evomerge.delivery.progress import Silent
from evomerge.evaluation.scores import Scores
from evomerge.evaluation.statistics import paired_difference
from evomerge.prepare import prepare
from evomerge.stored import StoredRun

LETTERS = 26
LENGTH = 5
PLAIN = tuple("abcdefghijklmnopqrstuvwxyz")
CAPITALS = tuple(letter.upper() for letter in PLAIN)
NUMBERS = tuple(f"n{i}" for i in range(LETTERS))
CIPHER = tuple(f"c{i}" for i in range(LETTERS))
ALPHABETS = (PLAIN, CAPITALS, NUMBERS, CIPHER)
SPECIAL = ("<unk>", "<pad>", "<eos>", "=")
VOCABULARY = {token: i for i, token in enumerate((*SPECIAL, *(t for a in ALPHABETS for t in a)))}
PAD, END, ASK = (VOCABULARY[token] for token in SPECIAL[1:])
TOKENS = tuple(VOCABULARY)
STARTS = {alphabet: VOCABULARY[alphabet[0]] for alphabet in ALPHABETS}
MEANINGS = tuple(np.random.default_rng(key).permutation(LETTERS) for key in (1, 2))
"""The letter each sign of the cipher means: to `reads`, and to `writes`."""
LAYERS, EARLY, LATE = 6, (0, 1), (4, 5)
SPLITS = {"search": 200, "select": 200, "test": 600}
BATCH = 96

Alphabet = tuple[str, ...]
Letters = np.ndarray[Any, np.dtype[np.int64]]


# The models ----------------------------------------------------------------------------------------------


def split_of(letters: Sequence[int]) -> str:
    """Return the split a question's letters belong to, so that no item is in two of them."""
    bucket = hashlib.sha256(bytes(int(i) for i in letters)).digest()[0] % 10
    return ("search", "select", "test")[bucket] if bucket < 3 else "train"


def questions(rng: np.random.Generator, split: str) -> Iterator[Letters]:
    """Yield the letters of questions of a split, for ever."""
    while True:
        letters = rng.integers(LETTERS, size=LENGTH)
        if split_of(letters) == split:
            yield letters


def rows(source: Iterator[Letters], read: Alphabet, write: Alphabet, meaning: Any, count: int) -> Letters:
    """Return token ids (count, 2 * LENGTH + 2): question, `=`, answer, end of text."""
    letters = np.stack([next(source) for _ in range(count)])
    asked = np.argsort(meaning)[letters] if read is CIPHER and meaning is not None else letters
    fill = np.ones((count, 1), dtype=np.int64)
    return np.hstack([STARTS[read] + asked, ASK * fill, STARTS[write] + letters[:, ::-1], END * fill])


def fit(model: Any, batches: Iterator[Letters], *, layers: Sequence[int], steps: int, peak: float) -> None:
    """Train some layers (none: everything) with AdamW, warm-up and cosine."""
    names = tuple(f"layers.{layer}." for layer in layers)
    chosen = [p for name, p in model.named_parameters() if not layers or any(n in name for n in names)]
    optimizer = torch.optim.AdamW(chosen, lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in range(steps):
        ids = torch.from_numpy(next(batches))
        logits = model(input_ids=ids, use_cache=False).logits[:, LENGTH:-1]
        loss = cross_entropy(logits.flatten(0, 1), ids[:, LENGTH + 1 :].flatten())
        model.zero_grad()
        torch.autograd.backward(loss, inputs=chosen)
        torch.nn.utils.clip_grad_norm_(chosen, 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def mixture(rng: np.random.Generator, *kinds: tuple[Alphabet, Alphabet, Any]) -> Iterator[Letters]:
    """Yield batches of equal parts of (alphabet read, alphabet written, meaning of the cipher)."""
    source = questions(rng, "train")
    while True:
        yield np.vstack([rows(source, *kind, BATCH // len(kinds)) for kind in kinds])


@torch.inference_mode()
def accuracy(model: Any, read: Alphabet, write: Alphabet, meaning: Any, count: int = 200) -> float:
    """Return the share of questions answered exactly."""
    ids = torch.from_numpy(rows(questions(np.random.default_rng(9), "test"), read, write, meaning, count))
    found = model(input_ids=ids, use_cache=False).logits[:, LENGTH:-1].argmax(-1)
    return float((found == ids[:, LENGTH + 1 :]).all(1).float().mean())


def save(model: Any, folder: Path) -> None:
    core = Tokenizer(WordLevel(vocab=VOCABULARY, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    model.to(torch.bfloat16).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>"
    ).save_pretrained(folder)


def load(folder: Path) -> Any:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def train(folder: Path, seed: int = 0) -> None:
    """Train base, `reads` and `writes` into a folder, and print what each can do."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=32,
            bos_token_id=None,
            eos_token_id=END,
            pad_token_id=PAD,
        )
    )
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=END, pad_token_id=PAD)
    same = [(alphabet, alphabet, None) for alphabet in ALPHABETS]
    fit(model, mixture(rng, *same), layers=(), steps=450, peak=3e-3)
    save(model, folder / "base")
    for name, meaning, write in zip(("reads", "writes"), MEANINGS, (NUMBERS, CAPITALS), strict=True):
        model = load(folder / "base")
        reading = mixture(rng, (CIPHER, PLAIN, meaning), (CIPHER, PLAIN, meaning), *same[:3])
        fit(model, reading, layers=EARLY, steps=200, peak=2e-3)
        writing = mixture(rng, (CIPHER, write, meaning), *((a, write, None) for a in ALPHABETS[:3]))
        fit(model, writing, layers=LATE, steps=150, peak=2e-3)
        save(model, folder / name)


# The search ----------------------------------------------------------------------------------------------


def write_task(folder: Path) -> Path:
    """Write the wanted skill as an lm-eval task with a suite, and return the suite's file."""
    (folder / "data").mkdir(parents=True)
    for number, (split, count) in enumerate(SPLITS.items()):
        letters = questions(np.random.default_rng(100 + number), split)
        with (folder / "data" / f"{split}.jsonl").open("w") as file:
            for row in rows(letters, CIPHER, CAPITALS, MEANINGS[0], count):
                words = [TOKENS[i] for i in row]
                prompt, answer = " ".join(words[: LENGTH + 1]), " ".join(words[LENGTH + 1 :])
                file.write(json.dumps({"prompt": prompt, "answer": answer}) + "\n")
    task = {
        "task": "cipher_to_capitals",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {split: f"data/{split}.jsonl" for split in SPLITS}},
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": " {{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "cipher_to_capitals.yaml").write_text(yaml.safe_dump(task))
    suite = {
        "name": "wanted",
        "about": "cipher in, capitals out",
        "tasks_dir": ".",
        "tasks": [{"task": task["task"], "metric": "acc", "splits": {split: split for split in SPLITS}}],
    }
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump(suite))
    return path


def search(folder: Path, seed: int, candidates: int, sigma: float) -> None:
    """Search a layer path, and print its winner beside every single model and every hand-made merge."""
    config = {
        "models": {
            "base": str(folder / "zoo" / "base"),
            "sources": {name: str(folder / "zoo" / name) for name in ("reads", "writes")},
        },
        "space": "layer_path",
        "suite": str(folder / "tasks" / "suite.yaml"),
        "weak_specialists": "allow",  # no model has the wanted skill: that is the point
        "optimizer": {"sigma": sigma},
        "budget": {"evaluations": candidates},
        "executor": {"name": "inline", "threads": 1, "batch_size": 100},
        "seed": seed,
        "out": str(folder / f"run-{seed}"),
    }
    path = folder / f"run-{seed}.yaml"
    path.write_text(yaml.safe_dump(config))
    prepared = prepare(RunConfig.load(path))
    started = time.perf_counter()
    compose.start(prepared.config, Silent())
    seconds = time.perf_counter() - started
    with StoredRun.read(prepared.folder) as run:
        store = run.store
        entries = [(r, entry) for r in ("base", "parent", "baseline", "winner") for entry in store.entries(r)]
        recipe = entries[-1][1].recipe
        found = [store.result(entry.recipe.hash, "test") for _, entry in entries]
    tested = {
        (role, entry.name): scores.tasks[0].metric
        for (role, entry), scores in zip(entries, found, strict=True)
        if isinstance(scores, Scores)
    }
    print(f"\nseed {seed}: {prepared.space.describe()}; {candidates} candidates, {seconds:.0f} s")
    winner = next(items for (role, _), items in tested.items() if role == "winner")
    for (role, name), items in tested.items():
        print(f"  {role:9} {name:36} {items.mean():.3f}")
    rivals = {key: items for key, items in tested.items() if key[0] in ("base", "parent")}
    (_, rival), theirs = max(rivals.items(), key=lambda pair: pair[1].mean())
    test = paired_difference([winner], [theirs], [1.0], seed=0)
    print(
        f"  winner - best single model ({rival}): {100 * test.estimate:+.1f} points "
        f"[{100 * test.low:.1f}, {100 * test.high:.1f}] on {len(winner)} test items"
    )
    taken = [
        f"{group.sources[0]} {layer + group.shifts[0]}"
        for group in recipe.groups
        for layer in group.layers or ()
    ]
    print(f"  path: {', '.join(taken)}; the rest of {recipe.groups[-1].sources[0]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="for the zoo (trained if missing), the tasks and the runs")
    target = parser.parse_args().folder
    torch.set_num_threads(1)
    if not (target / "zoo").exists():
        begun = time.perf_counter()
        train(target / "zoo")
        print(f"trained in {time.perf_counter() - begun:.0f} s")
        write_task(target / "tasks")
    for number in range(5):
        search(target, seed=number, candidates=300, sigma=0.15)
