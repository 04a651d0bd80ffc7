"""Arguments and options that several commands share, and the limits of a budget as options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

HIGHEST_SEED = 10**18
"""Equal to schema.LARGEST_SEED, which is not imported, so that `--help` answers at once."""

QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
SeedOption = Annotated[
    int | None, typer.Option("--seed", min=0, max=HIGHEST_SEED, help="Replace the config's seed.")
]
WorkersOption = Annotated[
    int | None, typer.Option("--workers", min=1, max=1024, help="Replace the config's number of workers.")
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="Replace the config's device: auto, cpu, cuda, cuda:N or mps.")
]
FullHashOption = Annotated[
    bool,
    typer.Option("--full-hash", help="Hash every byte of the models and compare with the last such check."),
]

ScoresFromOption = Annotated[
    Path | None,
    typer.Option(
        "--scores-from",
        metavar="RUN",
        help="Copy the scores of base, specialists and hand-made merges from another run.",
    ),
]

GateOption = Annotated[
    Path | None,
    typer.Option(
        "--gate", metavar="FILE", help="Check the rules of a YAML file; exit code 1 where one fails."
    ),
]

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="A run config (YAML).")]
ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A folder, a hub id (org/name@revision), or path+adapter.")
]
FolderArgument = Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")]
FormArgument = Annotated[
    Path, typer.Argument(metavar="OUT", help="The folder to write; for YAML forms, the file.")
]

FormOption = Annotated[
    str, typer.Option("--as", help="What to write: model, adapter or mergekit (`export`: also recipe).")
]
RankOption = Annotated[
    int | None,
    typer.Option(
        "--rank",
        min=1,
        max=1_000_000,
        help="With --as adapter: the largest rank per layer, where the merge is not a sum of adapters.",
    ),
]
KeepRestOption = Annotated[
    bool,
    typer.Option(
        "--keep-rest", help="With --as adapter: store tensors that a LoRA can't express as a whole."
    ),
]
ShardSizeOption = Annotated[
    str | None,
    typer.Option(
        "--shard-size",
        metavar="SIZE",
        help="With --as model: the largest weight file, like 5GB or 500MB; default: 5GB.",
    ),
]
PushOption = Annotated[
    str | None,
    typer.Option(
        "--push", metavar="ORG/NAME", help="Upload the model to the Hugging Face hub (login: hf auth login)."
    ),
]
PrivateOption = Annotated[bool, typer.Option("--private", help="With --push: in a private repository.")]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="With --push: say what would be uploaded, and upload nothing.")
]
GgufOption = Annotated[
    bool, typer.Option("--gguf", help="Also write OUT.gguf by llama.cpp's converter, or say how.")
]
LlamaCppOption = Annotated[
    Path | None,
    typer.Option(
        "--llama-cpp",
        metavar="FOLDER",
        help="With --gguf: llama.cpp's folder; default: $LLAMA_CPP, else the converter on the PATH.",
    ),
]
PickOption = Annotated[
    str,
    typer.Option(
        "--pick",
        help="winner, best-baseline, knee, best:TASK, weights:TASK=0.7,OTHER=0.3, a row of the report, "
        "or the start of a recipe hash.",
    ),
]
AcceptDifferenceOption = Annotated[
    bool, typer.Option("--accept-difference", help="Write weights that differ from the scored ones.")
]
ModelsOption = Annotated[
    Path | None,
    typer.Option("--models", metavar="CONFIG", help="Count the genes for the models of a run config."),
]
MovedModelsOption = Annotated[
    list[str] | None,
    typer.Option("--model", metavar="NAME=PATH", help="New location of a moved model; may be repeated."),
]
MovedSuiteOption = Annotated[
    str | None, typer.Option("--suite", metavar="PATH", help="New location of the suite's file.")
]

LabelsOption = Annotated[
    str,
    typer.Option(
        "--labels", help="text: the empirical Fisher; model: tokens drawn from its own predictions."
    ),
]
DrawsOption = Annotated[
    int,
    typer.Option("--seed", min=0, max=HIGHEST_SEED, help="Seed of the drawn tokens (--labels model)."),
]
SalvageOption = Annotated[
    Path | None,
    typer.Option("--salvage", metavar="NEW_FOLDER", help="Write a new run of what is whole."),
]
LostConfigOption = Annotated[
    Path | None,
    typer.Option("--config", metavar="CONFIG", help="The run's config, where the stored one is lost."),
]

SplitOption = Annotated[
    str | None,
    typer.Option("--split", help="Split of the items: search, select or test; default: the last one scored."),
]
EvaluationsOption = Annotated[
    int | None, typer.Option("--evaluations", min=1, help="Replace the budget's limit on full evaluations.")
]
BUDGET: dict[str, Any] = {
    "evaluations": EvaluationsOption,
    "items": Annotated[
        int | None, typer.Option("--items", min=1, help="Replace the budget's limit on scored items.")
    ],
    "generations": Annotated[
        int | None, typer.Option("--generations", min=1, help="Replace the budget's limit on generations.")
    ],
    "hours": Annotated[
        float | None, typer.Option("--hours", min=0.0, help="Replace the budget's limit on hours of work.")
    ],
    "until": Annotated[
        str | None,
        typer.Option(
            "--until",
            help='Replace the time the budget ends: "08:00" (its next occurrence), or a date and time.',
        ),
    ],
    "cost": Annotated[
        float | None,
        typer.Option("--cost", min=0.0, help="Replace the budget's limit on money, all hours together."),
    ],
    "per_hour": Annotated[
        float | None, typer.Option("--per-hour", min=0.0, help="Price of the machine per hour.")
    ],
    "patience": Annotated[
        int | None,
        typer.Option(
            "--patience", min=1, help="Replace the budget's limit on generations without improvement."
        ),
    ],
    "failures": Annotated[
        int | None,
        typer.Option("--failures", min=1, help="Stop with an error after this many failures in a row."),
    ],
}
"""Option name -> annotation: single limits that replace those of a config or of a stored run."""

PERMISSIONS: dict[str, Any] = {
    "trust_tasks": Annotated[
        bool, typer.Option("--trust-tasks", help="Allow the Python code that the suite's task files name.")
    ],
    "allow_code_execution": Annotated[
        bool,
        typer.Option(
            "--allow-code-execution", help="Allow tasks that execute the models' answers, in a sandbox."
        ),
    ],
    "ask_judges": Annotated[
        bool, typer.Option("--ask-judges", help="Allow prompts and answers to be sent to the suite's judges.")
    ],
}
"""Option name -> annotation: the fields of `evaluation.permissions.Permissions`."""

BaseOption = Annotated[
    str | None, typer.Option("--base", metavar="MODEL", help="What the others are fine-tunes of.")
]
SourceOption = Annotated[
    list[str] | None,
    typer.Option("--source", metavar="NAME=MODEL", help="A fine-tune to merge; once for each."),
]
ScoredOnOption = Annotated[
    str | None, typer.Option("--suite", help="What to score on: a preset's name or a YAML file.")
]
DataOption = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="[NAME=]FILE",
        help="Or your own data (.jsonl, .csv), once for each file; NAME: the source that is good at it.",
    ),
]
PromptOption = Annotated[
    str | None, typer.Option("--prompt", metavar="COL", help="The column of prompts; default: guessed.")
]
AnswerOption = Annotated[
    str | None, typer.Option("--answer", metavar="COL", help="The column of answers; default: guessed.")
]
ChoicesOption = Annotated[
    str | None, typer.Option("--choices", metavar="COL", help="The column of choices, if there is one.")
]
MetricOption = Annotated[
    str | None,
    typer.Option("--metric", help="exact, contains, regex, number, json or choice; default: guessed."),
]
HoursOption = Annotated[
    float | None, typer.Option("--hours", min=0.0, help="Limit of the budget; default: what ends in ten.")
]
TrialOption = Annotated[
    bool, typer.Option("--trial/--no-trial", help="Score two candidates to estimate the time.")
]
NewConfigOption = Annotated[Path, typer.Option("--out", metavar="YAML", help="The config to write.")]
