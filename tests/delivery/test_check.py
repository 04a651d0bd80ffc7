"""What `check` says of the memory of a GPU that merges, and of gradients that take the whole budget."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import evomerge
from evomerge.config import RunConfig
from evomerge.delivery import check
from evomerge.merging.tensors.on_device import available
from evomerge.prepare import prepare
from evomerge.running.store import StoreReader, facts
from evomerge.trial import Probe


@pytest.mark.skipif(not available("cpu"), reason="no Triton")
def test_the_memory_of_a_gpu_that_merges_is_shown(config: Callable[..., Path]) -> None:
    executor = {"name": "inline", "threads": 1}
    plain = prepare(RunConfig.load(config(generate=False, executor=executor)))
    merging = prepare(RunConfig.load(config(generate=False, executor={**executor, "merge_on": "device"})))
    count = plain.parameters
    assert check.gpu_memory(plain) is None
    assert check.gpu_memory(merging) == (4 * count, merging.models.files)
    assert merging.models.files >= 6 * count  # three in bfloat16
    probe = Probe(
        items={"search": 8, "select": 8, "test": 8},
        test_items={"demo_reverse": 8, "demo_upper": 8},
        seconds=dict.fromkeys(("search", "select", "test"), 1.0),
        workers=1,
        seconds_before=1.0,
        seconds_after=1.0,
        estimate=None,
        ends=None,
        cost=None,
        late=False,
    )
    nothing = check.Questions(prompts=(), notes=())
    assert "merge: " not in check.text(plain, probe, nothing)
    assert "merge:  on cpu, where a worker takes 0.0 GB for its live model and up to" in check.text(
        merging, probe, nothing
    )
    assert check.as_data(plain, probe, nothing)["memory"]["gpu"] is None
    taken = check.as_data(merging, probe, nothing)["memory"]["gpu"]
    assert taken == {"model": 4 * count, "sources": merging.models.files}


@pytest.mark.end_to_end
def test_gradients_that_take_the_whole_budget(config: Callable[..., Path], tmp_path: Path) -> None:
    path = config(
        generate=False,
        budget={"evaluations": 10},
        racing={"blocks": 3},
        optimizer={"population": 8},
        warm_start={},
    )
    found = evomerge.check(path)
    assert ", which take the whole budget: no generation" in str(found)
    run = evomerge.optimize(path)
    data = run.report().data
    items = {part["part"]: part["items"] for part in data["spending"]["parts"]}
    assert items["gradients"] + items["candidates"] <= 10 * found.data["items"]["search"]
    seconds = {part["part"]: part["seconds"] for part in data["spending"]["parts"]}
    assert 0 < seconds["gradients"] < 600
    assert data["milliseconds_per_candidate"]["forward"] > 0  # of where gradients led
    assert data["stopped"].startswith("gradients took the budget (")
    with StoreReader.read(tmp_path / "run") as store:
        assert not list(store.generations())
        assert sorted(facts.CHOSEN_ON.require(store)) == [0, 1, 2]
