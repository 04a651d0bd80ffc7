"""The run that merges a zoo's specialists, as files in its folder: run config, suite and tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from evomerge.zoo.settings import ZooSettings
from evomerge.zoo.tasks import ZooTasks, tasks_of, write_tasks


def suite(tasks: ZooTasks) -> dict[str, Any]:
    """Return the suite of a zoo: each skill, what is left of its texts, and two report-only tasks."""
    splits = {"search": "search", "select": "select", "test": "test"}
    rows: list[dict[str, Any]] = [
        {"task": tasks.task_of(skill), "metric": "acc", "specialist": skill, "splits": splits.copy()}
        for skill in tasks.skills
    ]
    rows.append({"task": tasks.text, "role": "retention", "splits": splits.copy()})
    reported = {"select": "select", "test": "test"}
    for task, skill, metric in (
        (tasks.generate, tasks.generate_skill, "exact_match"),
        (tasks.choice, tasks.choice_skill, "acc"),
    ):
        if skill:
            row = {"task": task, "metric": metric, "weight": 0, "specialist": skill}
            rows.append({**row, "splits": reported.copy()})
    about = (
        f"Skills of a zoo ({', '.join(tasks.skills)}), scored by teacher-forced exact match, and its texts."
    )
    return {"name": tasks.prefix, "about": about, "tasks_dir": "tasks", "tasks": rows}


def run_config(settings: ZooSettings, seed: int) -> dict[str, Any]:
    """Return the run config of a zoo; it is the demo's, with the zoo's models and suite."""
    sources = {
        specialist.skill: f"base+{specialist.skill}" if specialist.lora_rank else specialist.skill
        for specialist in settings.specialists
    }
    return {
        "models": {"base": "base", "sources": sources},
        "space": "task_arithmetic_layers",
        "suite": "suite.yaml",
        "budget": {"evaluations": 120},
        "dtype": "bfloat16",
        "seed": 0,
        "out": f"runs/zoo-{settings.architecture}-{seed}",
    }


def write_run(out: Path, settings: ZooSettings, seed: int) -> None:
    """Write a zoo's run config, suite and tasks into its folder."""
    tasks = tasks_of(settings.skills)
    write_tasks(out / "tasks", tasks)
    for name, content in (("suite.yaml", suite(tasks)), ("run.yaml", run_config(settings, seed))):
        text = yaml.safe_dump(content, sort_keys=False, width=110)
        (out / name).write_text(text, encoding="utf-8", newline="\n")
