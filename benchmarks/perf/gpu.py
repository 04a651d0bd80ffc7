"""Everything that needs a GPU, in one run of a few minutes: bits, bandwidth, memory, throughput.

    python benchmarks/perf/gpu.py              # on a machine with a CUDA GPU and Triton: under six minutes
    python benchmarks/perf/gpu.py --dry-run    # every part, tiny, on a CPU: does the script still work?

Parts (--parts names some): `kernels` compares weights merged on the device with the processor's, for every
method and type; `bandwidth` compares merging with `copy_`; `resume` kills a run with SIGKILL, resumes it, and
compares its digest with those of an unbroken run and of one merged on the processor; `memory` gives a run
less memory than its batches need; `throughput` times our harness and lm-eval's simple_evaluate, in seconds of
the wall; `generation` times our generation and transformers' continuous batching.

A part that fails is noted with its message, and the next one goes on. Results: tables on the terminal, for
LOG.md, and --out as JSON. On a CPU, Triton's interpreter runs the kernels, and what needs a GPU is noted so.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TRITON_INTERPRET", str(int("--dry-run" in sys.argv)))

import numpy as np
import torch
import yaml
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from evomerge import compose
from evomerge.config import DEMO_CONFIG, RunConfig
from evomerge.delivery.progress import Silent
from evomerge.errors import StoreError
from evomerge.evaluation.harness import Harness
from evomerge.evaluation.live_lm import quiet
from evomerge.evaluation.suite import Suite
from evomerge.merging import methods
from evomerge.merging.live.workbench import Workbench
from evomerge.merging.methods.selection import Boundary
from evomerge.merging.recipe import Recipe, TensorGroup
from evomerge.merging.sources.arrays import WeightArray, computable, of_tensor
from evomerge.merging.tensors.inputs import Difference, TensorKey, WarmInputs
from evomerge.merging.tensors.kernels import Operand
from evomerge.merging.tensors.on_device import DeviceMerger
from evomerge.running.batches import decisions
from evomerge.running.store import RunStore

DEMO = DEMO_CONFIG.parent / "demo"
TASKS = Path(__file__).parents[1] / "tasks" / "demo"
SOURCES = ("a", "b", "c")
PART = 1 << 20
PARAMETERS = {"density": 0.4, "gamma": 0.05, "lambda": 0.9}
Row = dict[str, Any]


class NeedsGpuError(Exception):
    """This part can't exist on a CPU."""


def needs_gpu(options: SimpleNamespace) -> None:
    if options.device == "cpu":
        raise NeedsGpuError


def synchronise(options: SimpleNamespace) -> None:
    if options.device != "cpu":
        torch.cuda.synchronize()


def group_of(method: str, sources: tuple[str, ...] = SOURCES) -> TensorGroup:
    declared = methods.get(method)
    chosen = sources[: declared.max_sources or len(sources)]
    parameters = {name: value for name, value in PARAMETERS.items() if name in declared.parameters}
    if "weight" in declared.parameters:
        parameters["weight"] = tuple(0.3 + 0.1 * i for i in range(len(chosen)))
    return TensorGroup(method=method, sources=chosen, parameters=parameters)


def random_models(folder: Path, dtype: torch.dtype, options: SimpleNamespace) -> dict[str, str]:
    """Write a base and three fine-tunes of it with the demo's tokenizer; return name -> folder."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    small = options.dry_run
    settings: dict[str, Any] = {
        **{
            "vocab_size": 128,
            "hidden_size": 16 if small else 512,
            "intermediate_size": 24 if small else 1376,
        },
        **{"num_hidden_layers": 1 if small else 2, "num_attention_heads": 2 if small else 8},
        **{"num_key_value_heads": 1 if small else 4, "tie_word_embeddings": True},
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "base")
    made = {}
    for number, name in enumerate(("base", *SOURCES)):
        noise = torch.Generator().manual_seed(number)
        for parameter in model.parameters() if number else ():
            parameter.data.add_(torch.randn(parameter.shape, generator=noise) * 0.02)
        model.to(dtype).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        model.to(torch.float32)
        made[name] = str(folder / name)
    return made


def kernels(options: SimpleNamespace) -> Iterator[Row]:
    """Merge with every method that is a blend, on the device and on the processor; compare all weights."""
    names = [name for name in methods.names() if methods.get(name).blend is not None]
    names = ["linear", "dare_ties", "ties"] if options.dry_run else names
    for turn, dtype in enumerate(("bfloat16", "float32", "float16")):
        with tempfile.TemporaryDirectory() as folder:
            models = random_models(Path(folder), getattr(torch, dtype), options)
            on_device, here = (
                Workbench(models, "base", device=options.device, compute_dtype="float32", merge_on=merge_on)
                for merge_on in ("device", "cpu")
            )
            for name in names[turn : turn + 1] if options.dry_run else names:
                recipe = Recipe(models=models, base="base", groups=(group_of(name),), dtype=dtype)
                same = []
                for _ in range(2):  # run to run, too
                    on_device.load(recipe)
                    same.append(on_device.digest(recipe))
                    on_device._loaded.clear()
                here.load(recipe)
                merger = on_device._on_device
                assert merger is not None
                yield {
                    "method": name,
                    "type": dtype,
                    "equal bits": same[0] == same[1] == here.digest(recipe),
                    "on the device": not merger._failed,
                }
                if merger._failed:
                    on_device._on_device = DeviceMerger(on_device._inputs, options.device)


class Held(WarmInputs):
    """Random tensors in memory, the same ones for all layers; thresholds are those of a part of them."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__({})
        noise = torch.Generator().manual_seed(0)
        base = torch.randn(shape, generator=noise).mul_(0.02)
        self._held = {"base": base.to(torch.bfloat16)}
        for name in SOURCES:
            self._held[name] = (base + torch.randn(shape, generator=noise) * 0.001).to(torch.bfloat16)

    def operand(self, source: str, tensor: str, base: TensorKey | None) -> Operand:
        return Operand(computable(of_tensor(self._held[source])), base is not None)

    def copied(self, recipe: Recipe, tensor: str) -> WeightArray | None:
        return None

    def computed(self, place: Difference) -> bool:
        return False

    def weights(self, place: Difference) -> WeightArray:
        return of_tensor(self._held[place[0][0]])

    def gram(self, places: tuple[Difference, ...], compute: Callable[[], list[list[float]]]) -> Any:
        return super().gram(tuple(((p[0][0], ""), None) for p in places), compute)

    def boundary(self, place: Difference, rank: int, magnitudes: Callable[[], WeightArray]) -> Boundary:
        """Return a boundary near that of a rank: sorting an embedding would take a minute."""
        source, whole = place[0][0], self._held["base"].numel()
        part = (self._held[source].view(-1)[:PART].float() - self._held["base"].view(-1)[:PART].float()).abs()
        share = min(PART, whole) / whole
        found = super().boundary(((source, ""), None), int(share * rank), lambda: of_tensor(part))
        return Boundary(found.magnitude, max(1, int(found.ties / share)))


def bandwidth(options: SimpleNamespace) -> Iterator[Row]:
    """Merge bfloat16 tensors of 1B and 8B models, with all sources on the device; compare with `copy_`.

    Counted are the bytes that must move: every source and the base are read once, the result is written. The
    time is that of `DeviceMerger.merge`, about 0.1 ms a tensor of which is Python's; small tensors show that.
    """
    shapes = {
        "1B, MLP": ((8192, 2048), 16),
        "1B, embedding": ((128256, 2048), 1),
        "8B, MLP": ((14336, 4096), 6),
    }
    shapes = {"tiny": ((16, 130), 1)} if options.dry_run else shapes
    rounds = 1 if options.dry_run else 10
    for size, (shape, layers) in shapes.items():
        held = Held(shape)
        count = shape[0] * shape[1]
        names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(layers)]
        live = {name: torch.zeros(shape, dtype=torch.bfloat16, device=options.device) for name in names}
        others = {name: torch.zeros_like(live[name]) for name in names}

        def copy(live: dict[str, Tensor] = live, others: dict[str, Tensor] = others) -> None:
            for name, tensor in live.items():
                tensor.copy_(others[name])

        copied = 2 * 2 * count * layers / measured(copy, rounds, options)
        del others
        merger = DeviceMerger(held, options.device)
        for method in ("linear", "ties", "dare_ties", "slerp")[: 1 if options.dry_run else None]:
            group = group_of(method)
            recipe = Recipe(models=dict.fromkeys(("base", *SOURCES), "m"), base="base", groups=(group,))
            left: list[str] = []

            def merge(recipe: Recipe = recipe, left: list[str] = left) -> None:
                left[:] = merger.merge(recipe, live, dict.fromkeys(live, count))  # noqa: B023

            seconds = measured(merge, rounds, options)
            reads = len(group.sources) + methods.get(method).uses_task_vectors("base")
            moved = 2 * count * layers * (reads + 1) / seconds
            yield {
                "model": size,
                "method": method,
                "ms a tensor": 1e3 * seconds / layers,
                "GB/s": moved / 1e9,
                "copy_ GB/s": copied / 1e9,
                "share of copy_": moved / copied,
                "on the device": not left,
            }


def measured(work: Callable[[], object], rounds: int, options: SimpleNamespace) -> float:
    """Return the median seconds of some work, after a first time that compiles and sends what it needs."""
    seconds = []
    for _ in range(rounds + 1):
        synchronise(options)
        start = time.perf_counter()
        work()
        synchronise(options)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def config_of(
    folder: Path,
    options: SimpleNamespace,
    *,
    models: dict[str, str] | None = None,
    items: int = 64,
    **executor: Any,
) -> Path:
    """Write a small run on two of the demo's models, or on others."""
    items = 4 if options.dry_run else items
    models = models or {name: str(DEMO / name) for name in ("base", "upper", "reverse")}
    upper, reverse = list(models)[1:3]
    suite = {
        "name": "small",
        "companion": "off",
        "tasks_dir": str(TASKS),
        "tasks": [
            {"task": f"demo_{skill}", "metric": "acc", "specialist": specialist, "splits": splits}
            for skill, specialist in (("upper", upper), ("reverse", reverse))
            for splits in ({"search": items, "select": items, "test": items},)
        ],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite))
    config = {
        "models": {
            "base": models["base"],
            "sources": {name: models[name] for name in (upper, reverse)},
        },
        "space": "global_weights",
        "suite": "suite.yaml",
        "optimizer": {"name": "cma_es", "population": 4},
        "budget": {"generations": 1 if options.dry_run else 3},
        "executor": {"name": "inline", "device": options.device, "threads": 1, "batch_size": 32, **executor},
        "racing": {"blocks": 1},
        "finalists": 1,
        "warm_start": {"gradients": "off"},
        "weak_specialists": "allow",
        "out": str(folder / "run"),
    }
    if options.dry_run:
        config |= {"baselines": [], "surrogate": "off"}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def run(config: Path) -> RunStore:
    loaded = RunConfig.load(config)
    compose.start(loaded, Silent())
    return RunStore.read(Path(loaded.out))


def resume(options: SimpleNamespace) -> Iterator[Row]:
    """Kill a run with SIGKILL, resume it, and compare its digest with that of an unbroken one."""
    merge_on = "cpu" if options.dry_run else "device"  # the interpreter takes minutes for a run
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with run(config_of(folder / "whole", options, merge_on=merge_on)) as store:
            whole = store.digest()
            scored = sum(len(store.scored_blocks(split)) for split in ("search", "select", "test"))
        config = config_of(folder / "killed", options, merge_on=merge_on)
        child = subprocess.Popen([sys.executable, __file__, "--run", str(config)])
        killed_at = 0
        while child.poll() is None:
            time.sleep(0.02)
            with contextlib.suppress(StoreError), RunStore.read(folder / "killed" / "run") as store:
                killed_at = len(store.scored_blocks("search"))
            if killed_at >= 3:
                child.send_signal(signal.SIGKILL)
                break
        child.wait()
        with run(config) as store:
            resumed = store.digest()
        yield {
            "run": "killed and resumed",
            "recipes scored when killed": killed_at,
            "killed": child.returncode == -signal.SIGKILL,
            "digest equal": resumed == whole,
            "scores": scored,
        }
        if not options.dry_run:
            with run(config_of(folder / "here", options, merge_on="cpu")) as store:
                yield {"run": "merged on the processor", "digest equal": store.digest() == whole}


def memory(options: SimpleNamespace) -> Iterator[Row]:
    """Run with less memory than the batches need: they must be halved, and the run must end."""
    needs_gpu(options)
    with tempfile.TemporaryDirectory() as name:
        models = random_models(Path(name), torch.float32, options)

        def used(place: str) -> tuple[int, int, list[str]]:
            """Return the bytes allocated before a run and at its peak, and what it said of its batches."""
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            config = config_of(Path(name) / place, options, models=models, items=150, batch_size=1024)
            with run(config) as store:
                said = [decision.sentence for decision in decisions(store)]
            return before, torch.cuda.max_memory_allocated(), said

        before, peak, said = used("plenty")
        yield {"limit MB": "none", "peak MB": (peak - before) / 1e6, "halvings": len(said)}
        _, total = torch.cuda.mem_get_info()
        for share in (0.8, 0.6, 0.4):
            limit = before + share * (peak - before)
            torch.cuda.set_per_process_memory_fraction(limit / total)
            try:
                _, reached, said = used(f"{share}")
            finally:
                torch.cuda.set_per_process_memory_fraction(1.0)
            yield {
                "limit MB": (limit - before) / 1e6,
                "peak MB": (reached - before) / 1e6,
                "halvings": len(said),
                "first": next(iter(said), ""),
            }
            if said:
                return


def throughput_model(options: SimpleNamespace) -> tuple[Any, Any]:
    """Return a random Llama (of 1B parameters on a GPU) and the demo's tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    small = options.dry_run
    settings: dict[str, Any] = {
        **{"vocab_size": 4096, "hidden_size": 16 if small else 2048, "num_hidden_layers": 1 if small else 16},
        **{"intermediate_size": 24 if small else 8192, "num_attention_heads": 2 if small else 32},
        **{"num_key_value_heads": 1 if small else 8, "max_position_embeddings": 512},
    }
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "base")
    settings |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    dtype = torch.float32 if small else torch.bfloat16
    torch.manual_seed(0)
    with torch.device(options.device):
        model = LlamaForCausalLM(LlamaConfig(**settings)).to(dtype).eval().requires_grad_(False)
    return model, tokenizer


def write_task(folder: Path, task: str, answers: int, items: int | None) -> None:
    """Write one of the demo's tasks where lm-eval finds its data, too; it asks for longer answers."""
    config = yaml.safe_load((TASKS / f"{task}.yaml").read_text())
    files = config["dataset_kwargs"]["data_files"]
    for split, file in files.items():
        lines = (TASKS / file).read_text().splitlines(keepends=True)
        files[split] = str(folder / Path(file).name)
        Path(files[split]).write_text("".join(lines[:items]))
    if "generation_kwargs" in config:
        config["generation_kwargs"]["max_gen_toks"] = answers
    (folder / f"{task}.yaml").write_text(yaml.safe_dump(config))


def harness_of(folder: Path, task: str, tokenizer: Any, model: Any, batch_size: int) -> Harness:
    metric = "exact_match" if task.endswith("generate") else "acc"
    splits = {split: split for split in ("search", "select", "test")}
    suite = {
        **{"name": "speed", "chat_template": "off", "companion": "off", "tasks_dir": str(folder)},
        "tasks": [{"task": task, "metric": metric, "splits": splits}],
    }
    read = Suite.from_mapping(suite, folder=folder, where="speed")
    harness = Harness(read, tokenizer=tokenizer, batch_size=batch_size, max_length=None)
    harness.prepare(model.config)
    harness.try_out(model)
    return harness


def throughput(options: SimpleNamespace) -> Iterator[Row]:
    """Score a task of each kind with our harness and with simple_evaluate, at the same batch size."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model, tokenizer = throughput_model(options)
    tasks = ("demo_translate_choice", "demo_upper_generate")
    rounds = 1 if options.dry_run else 3
    for task in tasks[:1] if options.dry_run else tasks:
        with tempfile.TemporaryDirectory() as name:
            write_task(Path(name), task, 32, 4 if options.dry_run else None)
            harness = harness_of(Path(name), task, tokenizer, model, 64)
            manager = TaskManager(include_path=name, include_defaults=False)
            lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=64)

            def theirs(task: str = task, manager: Any = manager, lm: Any = lm) -> None:
                with quiet():
                    lm_eval.simple_evaluate(lm, tasks=[task], task_manager=manager, bootstrap_iters=0)

            def mine(harness: Harness = harness) -> None:
                harness.weights_changed()
                harness.evaluate(model, harness.items("test"))

            ours, rival = measured(mine, rounds, options), measured(theirs, rounds, options)
            yield {"task": task, "ours s": ours, "simple_evaluate s": rival, "times faster": rival / ours}


def generation(options: SimpleNamespace) -> Iterator[Row]:
    """Answer the same prompts with our generation and with transformers' continuous batching."""
    needs_gpu(options)
    from transformers import GenerationConfig

    model, tokenizer = throughput_model(options)
    task, answers = "demo_upper_generate", 64
    with tempfile.TemporaryDirectory() as name:
        write_task(Path(name), task, answers, None)
        harness = harness_of(Path(name), task, tokenizer, model, 64)

        def mine() -> None:
            harness.weights_changed()
            harness.evaluate(model, harness.items("test"))

        ours = measured(mine, 3, options)
    lines = (TASKS / "data" / f"{task}.test.jsonl").read_text().splitlines()
    prompts = [tokenizer(json.loads(line)["prompt"]).input_ids for line in lines]
    greedy = GenerationConfig(max_new_tokens=answers, do_sample=False, eos_token_id=tokenizer.eos_token_id)
    rival = measured(lambda: model.generate_batch(inputs=prompts, generation_config=greedy), 3, options)
    yield {
        "prompts": len(prompts),
        "ours s": ours,
        "continuous batching s": rival,
        "times faster": rival / ours,
    }


PARTS = {part.__name__: part for part in (kernels, bandwidth, resume, memory, throughput, generation)}


def shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def table(rows: list[Row]) -> str:
    """Return rows as a Markdown table, with all their columns."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    lines += [f"| {' | '.join(shown(row.get(name, '')) for name in names)} |" for row in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="every part, tiny, on a CPU")
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)  # the process that is killed
    given = parser.parse_args()
    if given.run:
        run(given.run).close()
        return
    disable_progress_bar()
    options = SimpleNamespace(dry_run=given.dry_run, device="cpu" if given.dry_run else "cuda")
    machine = "a CPU (dry run)" if given.dry_run else torch.cuda.get_device_name()
    results: Row = {"machine": machine, "torch": torch.__version__, "numpy": np.__version__, "parts": {}}
    print(f"## On {machine}, torch {torch.__version__}\n\n`python {' '.join(sys.argv)}`")
    for name in given.parts:
        start, rows, failed = time.perf_counter(), [], ""
        try:
            for row in PARTS[name](options):
                rows.append(row)
        except NeedsGpuError:
            failed = "needs a card"
        except Exception as error:
            failed = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        seconds = time.perf_counter() - start
        results["parts"][name] = {"rows": rows, "failed": failed, "seconds": seconds}
        given.out.write_text(json.dumps(results, indent=1))  # what follows may crash the process
        said = [table(rows)] * bool(rows) + [f"Failed: {failed}"] * bool(failed)
        print(f"\n### {name} ({seconds:.0f} s)\n\n" + "\n\n".join(said), flush=True)


if __name__ == "__main__":
    main()
