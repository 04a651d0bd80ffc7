"""Starts the other tools of `other_tools.py` on a CPU. Runs in the tools' environment; evomerge is not used.

    PYTHON -P other_tools_on_cpu.py search mergekit-evolve|mergenetic SEED EVALUATIONS
    PYTHON -P other_tools_on_cpu.py score MODEL...

`-P`: scripts beside this one have names of libraries. The working directory is one that `other_tools.py`
prepared: `setup.json`, `genome.yaml`, `tasks/`. What is changed, at run time only:

- lm-eval's vLLM module, which both tools import, is replaced by a class that loads the model with
  transformers in bfloat16.
- ray is told of one GPU, so that mergekit-evolve's actor, which asks for one, starts.
- mergekit-evolve: `torch.cpu` gets the `empty_cache` that it calls; lm-eval gets `device="cpu"`; pycma gets
  the seed, for which the tool has no option, and stops after exactly as many evaluations.
- mergenetic: lm-eval's index of tasks, which it makes for every candidate, is made once.

`search` leaves the best candidate as `best/EVALUATIONS.yaml`, or the weights as `best/EVALUATIONS.json`
(mergenetic: of each generation so far).
`score` prints per model what each tool scores it, as one line of JSON.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import shutil
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

BATCH = 64


def patch() -> None:
    """Change lm-eval and torch as the module's text says. Also called in each worker process of ray."""
    import lm_eval
    import lm_eval.models
    import torch
    from lm_eval.models.huggingface import HFLM

    class VLLM(HFLM):  # type: ignore[misc]
        def __init__(self, pretrained: str, **_: Any) -> None:
            super().__init__(pretrained=pretrained, device="cpu", dtype="bfloat16", batch_size=BATCH)

    module: Any = types.ModuleType("lm_eval.models.vllm_causallms")
    module.VLLM = VLLM
    sys.modules[module.__name__] = lm_eval.models.vllm_causallms = module
    lm_eval.simple_evaluate = functools.partial(lm_eval.simple_evaluate, device="cpu")
    torch.cpu.empty_cache = lambda: None


def mergekit_evolve(seed: int, evaluations: int) -> None:
    """Run the command `mergekit-evolve`; keep the configuration that it prints in the end.

    pycma ends a generation later than `maxfevals` says, and scores the mean of the last one, too.
    """
    import cma
    import ray

    fmin2 = cma.fmin2

    def seeded(*args: Any, x0: Any, options: Any, **others: Any) -> Any:
        size = cma.CMAEvolutionStrategy(x0, 1, {"verbose": -9}).popsize
        asked = {"seed": seed + 1, "maxfevals": evaluations - 1 - size, "verb_log": 0}
        return fmin2(*args, x0=x0, options={**options, **asked}, **others)

    cma.fmin2 = seeded
    hook = {"worker_process_setup_hook": patch}
    ray.init(num_cpus=1, num_gpus=1, include_dashboard=False, log_to_driver=False, runtime_env=hook)
    patch()
    from mergekit.scripts.evolve import main

    options = ["--storage-path=storage", "--task-search-path=tasks", f"--batch-size={BATCH}", "--num-gpus=1"]
    options += ["--no-merge-cuda", "--no-save-final-model"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            main(["genome.yaml", *options], standalone_mode=False)
        finally:
            ray.shutdown()
            Path("printed.txt").write_text(printed.getvalue())
    best = printed.getvalue().rpartition("Best merge configuration:\n")[2]
    Path(f"best/{evaluations}.yaml").write_text(best)


def problem() -> Any:
    """Return mergenetic's problem with one objective: the accuracy on all items."""
    from mergenetic.evaluation import lm_harness
    from mergenetic.merging import TaskArithmeticMerger
    from mergenetic.optimization.predefined_problems import ConfigPE, CrossLingualMathProblem

    lm_harness.TaskManager = functools.cache(lm_harness.TaskManager)
    setup = json.loads(Path("setup.json").read_text())
    merger = TaskArithmeticMerger("run", setup["base"], setup["models"], "yaml", "merged", "bfloat16")
    ids = list(range(setup["items"]))
    tasks = {"all": setup["task"]}
    return CrossLingualMathProblem(
        merger,
        None,
        None,
        "all",
        ConfigPE(thetas=None, sample_ids=ids, weights=None, correct_metric="acc", mode="mean"),
        lm_eval_tasks={"search": tasks, "test": tasks},
        n_var=len(setup["models"]),
        n_obj=1,
        eval_batch_size=BATCH,
        detect_lang=False,
        additional_templates_folder="tasks",
        device="cpu",
        load_in_4bit=False,
    )


def mergenetic(seed: int, evaluations: int) -> None:
    """Run mergenetic's Searcher with pymoo's GA, 16 in a generation; keep the best after each generation."""
    patch()
    from mergenetic.searcher import Searcher
    from pymoo.algorithms.soo.nonconvex.ga import GA
    from pymoo.core.callback import Callback

    class Kept(Callback):  # type: ignore[misc]
        def notify(self, algorithm: Any) -> None:
            best = json.dumps(algorithm.opt.get("X")[0].tolist())
            Path(f"best/{algorithm.evaluator.n_eval}.json").write_text(best)

    size = 16
    algorithm = GA(pop_size=size, callback=Kept())
    Searcher(problem(), algorithm, ".", evaluations // size, seed, "run").search()


def score(models: list[str]) -> None:
    """Print what each tool scores models: the mean accuracy of the tasks."""
    patch()
    import lm_eval.tasks
    import yaml
    from mergekit.evo.config import EvolMergeConfiguration
    from mergekit.evo.helpers import evaluate_model

    config = EvolMergeConfiguration.model_validate(yaml.safe_load(Path("genome.yaml").read_text()))
    manager, theirs = lm_eval.tasks.TaskManager(include_path="tasks"), problem()
    for model in models:
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "model"  # evaluate_model deletes what it scored
            shutil.copytree(model, copy)
            result = evaluate_model(
                str(copy),
                config.tasks,
                num_fewshot=None,
                limit=None,
                vllm=False,
                batch_size=BATCH,
                task_manager=manager,
                apply_chat_template=False,
                fewshot_as_multiturn=False,
            )
        (loss,), _ = theirs.metrics_4_genotype(theirs.load_model(model))
        row = {"mergekit-evolve": result["score"] / len(config.tasks), "mergenetic": -float(loss)}
        print(json.dumps({"model": model, **row}), flush=True)


def main() -> None:
    """Read the command line."""
    command, *words = sys.argv[1:]
    if command == "score":
        score(words)
        return
    Path("best").mkdir(exist_ok=True)
    tool = {"mergekit-evolve": mergekit_evolve, "mergenetic": mergenetic}[words[0]]
    tool(int(words[1]), int(words[2]))


if __name__ == "__main__":
    main()
