"""Build a zoo: one base and its specialists, trained from scratch, and a run config that merges them.

    card = build_zoo(Path("my-zoo"), seed=0)          # about five minutes on two cores
    card.models["reverse"].accuracy["reverse"]        # near 1.0

Training runs in spawned single-thread processes, so it does not change the caller's threads, random state and
determinism settings. Not covered: resuming an incomplete zoo (build it again, into an empty folder).
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from evomerge.errors import UserError
from evomerge.zoo.run_files import write_run
from evomerge.zoo.settings import Size, SpecialistSettings, ZooSettings, zoo_settings

CARD_NAME = "zoo.json"
_BASE = "base"
WEAK_SPECIALIST = 0.7
STRONG_BASE = 0.5
_LIBRARIES = ("torch", "transformers", "tokenizers", "peft", "safetensors", "numpy")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """One model of a zoo: test accuracy per skill, in [0, 1], and word perplexity of the texts."""

    kind: str  # "base", "full" or "lora"
    skill: str | None
    accuracy: dict[str, float]
    text_perplexity: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ZooCard:
    """The contents of ``zoo.json``: a zoo's settings and its models' scores, without times and paths."""

    seed: int
    size: str
    settings: dict[str, Any]
    models: dict[str, ModelCard]
    versions: dict[str, str]

    def to_json(self) -> str:
        """Return the card as indented JSON, the same text for the same card."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def notes(self) -> list[str]:
        """Return one sentence per specialist that is weak, and per skill that the base already has."""
        base = self.models[_BASE].accuracy
        notes = []
        for name, model in self.models.items():
            if model.skill and model.accuracy[model.skill] < WEAK_SPECIALIST:
                share = model.accuracy[model.skill]
                notes.append(
                    f"{name} is a weak specialist: {share:.2f} of its own items, under {WEAK_SPECIALIST}"
                )
        for skill, share in base.items():
            if share > STRONG_BASE:
                notes.append(f"the base already knows {skill}: {share:.2f} of its items, over {STRONG_BASE}")
        return notes

    @classmethod
    def load(cls, folder: Path) -> ZooCard:
        """Read the card of a complete zoo. Raises UserError for any other folder."""
        try:
            fields = json.loads((folder / CARD_NAME).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UserError(
                f"{folder} is not a finished zoo", expected=f"a file {CARD_NAME} in it", fix="build it again"
            ) from error
        models = {name: ModelCard(**card) for name, card in fields.pop("models").items()}
        return cls(models=models, **fields)


def build_zoo(
    out: Path,
    *,
    seed: int = 0,
    size: Size = "demo",
    skills: Sequence[str] | None = None,
    architecture: str = "llama",
    jobs: int = 2,
    progress: Callable[[str], None] | None = None,
) -> ZooCard:
    """Train a zoo into `out`: ``base``, one folder per specialist, and ``zoo.json`` last.

    Beside them, ``run.yaml`` is the config of a run that merges the specialists; ``suite.yaml`` and ``tasks``
    are what it scores them on.

    The same seed gives the same bytes on one machine with the same libraries. A script that calls this needs
    the usual ``if __name__ == "__main__":`` guard of Python's multiprocessing.

    Args:
        out: the folder to write, new or empty.
        seed: of training data, initial weights and batches, 0 or more.
        size: "demo" (four full specialists and the adapter ``sort``) or "tiny" (for tests, about 40 s:
            ``reverse``, ``upper`` and the adapter ``add``).
        skills: two to eight skills of `rules.RULES`, one specialist each; default: those of the size.
        architecture: a model type in `settings.ARCHITECTURES`.
        jobs: largest number of single-thread processes that train at once.
        progress: called with one line per event.

    Raises:
        UserError: `out` is not empty, or another argument is not valid.
    """
    settings = zoo_settings(size, skills, architecture)
    _refuse_bad_arguments(out, seed, jobs)
    say = progress or _say_nothing
    out.mkdir(parents=True, exist_ok=True)
    write_run(out, settings, seed)
    scores = _train_all(settings, out, seed, jobs, say)
    card = ZooCard(
        seed=seed,
        size=size,
        settings=json.loads(json.dumps(asdict(settings))),  # lists instead of tuples, as after reading
        models={name: _model_card(name, settings, scores[name]) for name in scores},
        versions={name: version(name) for name in _LIBRARIES},
    )
    for note in card.notes():
        say(f"note: {note}")
    temporary = out / f".{CARD_NAME}.tmp"
    temporary.write_text(card.to_json(), encoding="utf-8", newline="\n")
    temporary.replace(out / CARD_NAME)
    return card


def _say_nothing(line: str) -> None:
    del line


def _refuse_bad_arguments(out: Path, seed: int, jobs: int) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            f"{out} is not an empty folder",
            expected="a folder that is empty or does not exist",
            fix="name another folder, or delete this one",
        )
    if seed < 0:
        raise UserError("the seed of a zoo can't be negative", expected="0 or more", got=str(seed))
    if jobs < 1:
        raise UserError("the number of jobs must be positive", expected="1 or more", got=str(jobs))


def _train_all(
    settings: ZooSettings, out: Path, seed: int, jobs: int, say: Callable[[str], None]
) -> dict[str, dict[str, float]]:
    """Train the base, then every specialist; return the scores by model name, in the settings' order."""
    seeds = np.random.SeedSequence(seed).spawn(1 + len(settings.specialists))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_prepare_worker) as pool:
        try:
            say(f"{_BASE}: training ({settings.base_steps} steps)")
            scores = {_BASE: pool.submit(_train_base, settings, seeds[0], out).result()}
            say(f"{_BASE}: {_describe(scores[_BASE])}")
            futures: dict[Future[dict[str, float]], str] = {
                pool.submit(_train_specialist, settings, specialist, child, out): specialist.skill
                for specialist, child in zip(settings.specialists, seeds[1:], strict=True)
            }
            for future in as_completed(futures):
                name = futures[future]
                scores[name] = future.result()
                say(f"{name}: {_describe(scores[name])}")
                say(f"{name}: own skill {scores[name][name]:.2f}, base {scores[_BASE][name]:.2f}")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {name: scores[name] for name in (_BASE, *(s.skill for s in settings.specialists))}


def _describe(scores: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in scores.items())


def _model_card(name: str, settings: ZooSettings, scores: dict[str, float]) -> ModelCard:
    ranks = {specialist.skill: specialist.lora_rank for specialist in settings.specialists}
    rank = ranks.get(name)
    kind = "base" if rank is None else "lora" if rank else "full"
    rounded = {key: round(value, 6) for key, value in scores.items()}
    perplexity = rounded.pop("text_perplexity")
    return ModelCard(
        kind=kind, skill=None if name == _BASE else name, accuracy=rounded, text_perplexity=perplexity
    )


# ------------------------------------------------------------------------------------- in worker processes


def _prepare_worker() -> None:
    from evomerge.zoo.train import prepare_process

    prepare_process()


def _finish_then_rename(folder: Path, train: Callable[[Path], dict[str, float]]) -> dict[str, float]:
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        scores = train(temporary)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return scores


def _train_base(settings: ZooSettings, seed: np.random.SeedSequence, out: Path) -> dict[str, float]:
    from evomerge.zoo import train

    return _finish_then_rename(out / _BASE, partial(train.train_base, settings, seed))


def _train_specialist(
    settings: ZooSettings, specialist: SpecialistSettings, seed: np.random.SeedSequence, out: Path
) -> dict[str, float]:
    from evomerge.zoo import train

    job = partial(train.train_specialist, settings, specialist, seed, out / _BASE)
    return _finish_then_rename(out / specialist.skill, job)
