"""Secrets: refused in configs, taken from environment variables, found in no file and no output of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evomerge.config import RunConfig, TrackerSpec
from evomerge.delivery.tracking import Tracked, open_tracker, require_packages
from evomerge.errors import ConfigError, UserError
from tests.test_cli import everything_in, invoke, succeed

PASSWORD, TOKEN = "pa55-w0rd", "t0ken-9f"
URI = "http://ann:${MY_PASSWORD}@127.0.0.1:9/?token=${MY_TOKEN}"


@pytest.mark.parametrize(
    "changes",
    [
        {"tracking": [{"name": "mlflow", "uri": f"https://ann:{PASSWORD}@host"}]},
        {"tracking": [{"name": "mlflow", "uri": f"https://host/?token={PASSWORD}"}]},
        {"tracking": [{"name": "tensorboard", "folder": f"s3://ann:{PASSWORD}@bucket"}]},
        {"tracking": f"https://ann:{PASSWORD}@host"},
        {"executor": {"name": "ray", "address": f"ray://{PASSWORD}@head:10001"}},
        {"models": {"base": f"https://ann:{PASSWORD}@host/base", "sources": {"a": "b"}}},
        {"models": {"base": "x", "sources": {"a": f"https://host/?key={PASSWORD}"}}},
        {"out": f"sftp://ann:{PASSWORD}@host/run"},
    ],
)
def test_a_secret_in_a_config_is_refused(
    changes: dict[str, Any], config: Callable[..., Path], tmp_path: Path
) -> None:
    result = invoke("check", config(**changes))
    assert result.exit_code == 2
    assert "holds a secret" in result.output
    assert "${NAME}" in result.output
    assert PASSWORD not in result.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", ["api_key", "token", "password"])
def test_a_key_for_a_secret_is_unknown_and_its_value_is_not_shown(
    key: str, config: Callable[..., Path]
) -> None:
    result = invoke("check", config(tracking=[{"name": "wandb", key: PASSWORD}]))
    assert result.exit_code == 2
    assert f"unknown key 'tracking.0.{key}'" in result.output
    assert PASSWORD not in result.output


def test_a_variable_that_is_not_set_is_named() -> None:
    with pytest.raises(UserError, match="environment variable MY_PASSWORD, which is not set"):
        require_packages([TrackerSpec(name="mlflow", uri=URI)])


def test_a_tracker_gets_the_values(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MY_FOLDER", str(tmp_path / "elsewhere"))
    spec = TrackerSpec(name="tensorboard", folder="${MY_FOLDER}/logs")
    open_tracker(spec, tmp_path / "run", {}).close(finished=True)
    assert (tmp_path / "elsewhere" / "logs" / "run").is_dir()
    assert spec.folder == "${MY_FOLDER}/logs"


def test_a_failing_tracker_does_not_tell_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MY_PASSWORD", PASSWORD)
    monkeypatch.setenv("MY_TOKEN", TOKEN)
    warnings: list[str] = []

    def refuse(spec: TrackerSpec, *_: Any) -> Any:
        raise ConnectionError(f"401 for {spec.name} with {PASSWORD} at https://bob:other@host?token={TOKEN}")

    with Tracked([TrackerSpec(name="mlflow", uri=URI)], tmp_path, warn=warnings.append, open_=refuse) as it:
        it.generation_done(10**6, 1.0, 1.0)
    (warning,) = warnings
    assert "401" in warning
    assert not [secret for secret in (PASSWORD, TOKEN, "other") if secret in warning]


@pytest.mark.end_to_end
@pytest.mark.usefixtures("formula")
def test_no_file_and_no_output_of_a_run_holds_a_secret(
    config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    path = config(
        generate=False, tracking=["tensorboard", {"name": "mlflow", "uri": URI}], budget={"generations": 1}
    )
    run = tmp_path / "run"
    assert invoke("run", path).exit_code == 2  # the variables are not set
    assert not run.exists()
    monkeypatch.setenv("MY_PASSWORD", PASSWORD)
    monkeypatch.setenv("MY_TOKEN", TOKEN)
    outputs = [succeed("run", path)]
    assert "tracking with mlflow failed" in outputs[0]
    outputs += [succeed(verb, run, "--json") for verb in ("status", "report")]
    outputs += [succeed("export", run, tmp_path / "model"), succeed("resume", run, "--generations", "2")]
    found = everything_in(tmp_path)
    assert b"${MY_PASSWORD}" in found["run/run.sqlite"]
    texts = {**found, **{str(number): text.encode() for number, text in enumerate(outputs)}}
    assert [name for name, text in texts.items() for s in (PASSWORD, TOKEN) if s.encode() in text] == []


def test_a_config_that_was_not_read_from_a_file_is_stored_without_secrets(
    config: Callable[..., Path],
) -> None:
    from evomerge.prepare import prepare, run_facts
    from evomerge.running.store import facts

    spec = TrackerSpec(name="mlflow", uri=f"https://ann:{PASSWORD}@host")
    loaded = RunConfig.load(config(generate=False)).model_copy(update={"tracking": (spec,)})
    stored = run_facts(prepare(loaded))[facts.CONFIG]
    assert stored["tracking"][0]["uri"] == "https://***@host"
    assert PASSWORD not in repr(stored)


def test_errors_of_yaml_do_not_show_secrets(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"tracking: !!int https://ann:{PASSWORD}@host\n")
    with pytest.raises(ConfigError) as caught:
        RunConfig.load(path)
    assert PASSWORD not in str(caught.value)
