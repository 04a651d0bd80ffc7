"""Commands on models and search spaces: merge, analyze, fisher, gram, evaluate, zoo, spaces.

Heavy imports happen inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evomerge.cli.forms import check_form, say_adapter, say_file, shard_bytes
from evomerge.cli.groups import app, spaces, zoo
from evomerge.cli.options import (
    DrawsOption,
    FolderArgument,
    FormArgument,
    FormOption,
    GateOption,
    KeepRestOption,
    LabelsOption,
    ModelArgument,
    ModelsOption,
    RankOption,
    ShardSizeOption,
)
from evomerge.cli.reports import show_gate
from evomerge.cli.terminal import (
    command,
    output,
    progress_bar,
    relative,
)

if TYPE_CHECKING:
    pass


@command(app, "merge")
def merge(
    file: Annotated[Path, typer.Argument(metavar="RECIPE", help="recipe.yaml, or a mergekit YAML.")],
    out: FormArgument,
    form: FormOption = "model",
    rank: RankOption = None,
    keep_rest: KeepRestOption = False,
    shard_size: ShardSizeOption = None,
) -> None:
    """Merge by a recipe or a mergekit YAML: write a model, a LoRA adapter, or mergekit YAML."""
    from evomerge.api.models import FORMS
    from evomerge.api.models import merge as merge_models

    check_form(form, FORMS, rank, keep_rest, shard_size)
    done = merge_models(
        file,
        out,
        form=form,
        rank=rank,
        keep_rest=keep_rest,
        max_shard_bytes=shard_bytes(shard_size),
        say=lambda note: output.say(f"note: {note}"),
    )
    if done.adapter is not None:
        say_adapter(done)
    elif form == "mergekit":
        say_file(out, done.recipe)
    else:
        output.say(f"wrote {relative(out)} (recipe {done.recipe[:12]})")
        output.data({"folder": str(out), "recipe": done.recipe})


@command(app, "import")
def import_(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, or a .gguf file.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; new or empty.")],
    dtype: Annotated[
        str | None, typer.Option(help="Of the written weights. [default: bfloat16, or as stored]")
    ] = None,
) -> None:
    """Write a quantised, pickled or GGUF model as a folder that can be merged."""
    from evomerge.api.tools import import_model

    done = import_model(model, out, dtype=dtype)
    how = "tensor by tensor" if done.streamed else "by transformers"
    output.say(f"wrote {relative(out)}: {done.form} weights as {done.dtype}, {how}")
    output.data({"folder": str(out), "form": done.form, "dtype": done.dtype, "streamed": done.streamed})


@command(app, "analyze")
def analyze(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="A run config, recipe.yaml or mergekit YAML.")
    ],
    base: Annotated[
        str | None, typer.Option("--base", help="The base: a model of the file, or a location.")
    ] = None,
    threshold: Annotated[
        float,
        typer.Option(
            min=0.0,
            help="An element counts as changed above this multiple of the tensor's mean |task vector|.",
        ),
    ] = 1.0,
    top: Annotated[float, typer.Option(help="Share of largest elements compared between models.")] = 0.2,
    shown: Annotated[str, typer.Option("--map", help="conflict, cosine, overlap or norm.")] = "conflict",
    html: Annotated[Path | None, typer.Option("--html", help="Also write a page with all maps.")] = None,
    gain: Annotated[
        bool,
        typer.Option(
            "--gain", help="Also load the models of a run config and predict what merges of two of them gain."
        ),
    ] = False,
) -> None:
    """Show where fine-tunes agree or conflict, from their files alone, and which method to start from."""
    from evomerge.api.models import analyze as analyze_models

    with progress_bar("gradients" if gain else "reading") as progress:
        found = analyze_models(
            config, base=base, threshold=threshold, top=top, shown=shown, gain=gain, progress=progress
        )
    output.say(found.draw(output.console.width))
    if html is not None:
        output.say(f"page: {relative(found.save(html))}")
    output.data(found.data)


@command(app, "fisher")
def fisher(
    model: ModelArgument,
    text: Annotated[Path, typer.Argument(metavar="TEXT", help="A text file, one sequence per line.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The safetensors file to write.")],
    labels: LabelsOption = "text",
    sequences: Annotated[int | None, typer.Option(min=1, max=10**9, help="Use only this many lines.")] = None,
    max_length: Annotated[int, typer.Option(min=2, max=2**24, help="Cut lines to this many tokens.")] = 512,
    seed: DrawsOption = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
) -> None:
    """Estimate a model's diagonal Fisher information on a text, for merges with the method `fisher`."""
    from evomerge.api.tools import fisher as estimate

    with progress_bar("sequences") as progress:
        done = estimate(
            model,
            text,
            out,
            labels=labels,
            sequences=sequences,
            max_length=max_length,
            seed=seed,
            device=device,
            progress=progress,
        )
    output.say(
        f"wrote {relative(out)} ({done.sequences} sequences, {done.tokens} tokens, mean {done.mean:.3g})"
    )
    output.data({"file": str(out), "sequences": done.sequences, "tokens": done.tokens, "mean": done.mean})


@command(app, "gram")
def gram(
    model: ModelArgument,
    text: Annotated[Path, typer.Argument(metavar="TEXT", help="A text file, one sequence per line.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The safetensors file to write.")],
    sequences: Annotated[int | None, typer.Option(min=1, max=10**9, help="Use only this many lines.")] = None,
    max_length: Annotated[int, typer.Option(min=2, max=2**24, help="Cut lines to this many tokens.")] = 512,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
) -> None:
    """Measure the inputs of a model's linear layers on a text, for merges with the method `regmean`."""
    from evomerge.api.tools import gram as measure

    with progress_bar("sequences") as progress:
        done = measure(
            model, text, out, sequences=sequences, max_length=max_length, device=device, progress=progress
        )
    output.say(
        f"wrote {relative(out)} ({done.sequences} sequences, {done.tokens} tokens, {done.matrices} matrices)"
    )
    output.data(
        {"file": str(out), "sequences": done.sequences, "tokens": done.tokens, "matrices": done.matrices}
    )


@command(app, "evaluate")
def evaluate(
    model: ModelArgument,
    suite: Annotated[
        str | None, typer.Option("--suite", help="A suite: a preset's name or a YAML file; default: RUN's.")
    ] = None,
    split: Annotated[str, typer.Option(help="search, select or test.")] = "test",
    run: Annotated[
        Path | None, typer.Option("--run", metavar="RUN", help="Score as this run does: suite and settings.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, max=65_536, help="Requests per forward pass; default: RUN's, or 64.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the forward pass: float32, bfloat16 or float16; default: RUN's.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:N or mps; default: RUN's, or a GPU if there is one.")
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(min=8, max=2**24, help="Longest input in tokens; default: RUN's, or the model's."),
    ] = None,
    gate: GateOption = None,
    permissions: Any = None,
) -> None:
    """Score one model on a suite, with --gate against the rules for the winner of a run."""
    from evomerge.api.models import evaluate as evaluate_model

    found = evaluate_model(
        model,
        suite,
        split=split,
        run=run,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        max_length=max_length,
        gate=gate,
        permissions=permissions,
    )
    output.show(found)
    if found.gate is not None:
        show_gate(found.gate)


@command(zoo, "build")
def zoo_build(
    out: FolderArgument,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the training.")] = 0,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="A two-layer variant for tests, in under a minute.")
    ] = False,
    skills: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...", help="Two to eight skills, one specialist each; default: the demo's."
        ),
    ] = None,
    architecture: Annotated[str, typer.Option(help="Model type: llama, qwen3, mistral or gemma2.")] = "llama",
) -> None:
    """Train small models from scratch: a base and its specialists, with a run that merges them.

    Takes about five minutes on two cores for five skills. Skills: add, reverse, translate, upper, sort (the
    demo's), subtract, rotate, shift, count, interleave, complement, cumulate, swap, double, skip.
    `evomerge run OUT/run.yaml` then merges the specialists.
    """
    from evomerge.api.tools import build_zoo

    build_zoo(
        out,
        seed=seed,
        size="tiny" if tiny else "demo",
        skills=None if skills is None else [skill.strip() for skill in skills.split(",")],
        architecture=architecture,
        progress=output.say,
    )
    output.say(f"built {relative(out)}; evomerge run {relative(out / 'run.yaml')} merges its specialists")


@command(spaces, "")
def spaces_list(context: typer.Context, models: ModelsOption = None) -> None:
    """List the search-space presets: number of genes, methods, purpose."""
    from evomerge.api.tools import spaces as presets

    if context.invoked_subcommand is None:
        output.show(presets(models))


@command(spaces, "show")
def spaces_show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A preset's name, or a YAML file.")],
    models: ModelsOption = None,
) -> None:
    """Print the genes of a search space: kind, values, where each applies and when it has an effect."""
    from evomerge.api.tools import space

    output.show(space(name, models))
