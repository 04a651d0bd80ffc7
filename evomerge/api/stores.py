"""The store of a run: examined, salvaged, migrated."""

from __future__ import annotations

from pathlib import Path

from evomerge.api.runs import AnyPath
from evomerge.api.view import View
from evomerge.delivery import doctor
from evomerge.delivery.doctor import Diagnosis
from evomerge.running.store import migrations
from evomerge.running.store.migrations import Migrated


class Examined(View):
    """What is whole in a run's store."""

    def __init__(self, diagnosis: Diagnosis) -> None:
        super().__init__(doctor.as_data(diagnosis), lambda width: doctor.text(diagnosis))
        self._diagnosis = diagnosis

    def refuse(self) -> None:
        """Raise StoreError where the store is damaged."""
        self._diagnosis.refuse()

    def salvage(self, out: AnyPath, config: AnyPath | None = None) -> View:
        """Write a new run of what is whole.

        Args:
            out: its folder.
            config: the run config, where the stored one is lost.
        """
        saved = doctor.save(self._diagnosis, Path(out), None if config is None else Path(config))
        return View(doctor.as_data(self._diagnosis, saved), lambda width: doctor.saved_text(saved))


def examine(folder: AnyPath) -> Examined:
    """Check every row of a run's store by its checksum; nothing is changed."""
    return Examined(doctor.examine(Path(folder)))


def migrate(folder: AnyPath) -> Migrated | None:
    """Migrate a run stored by an older evomerge; None where nothing is to do. The old store is kept."""
    return migrations.migrate(Path(folder))


def migrated_data(done: Migrated | None) -> dict[str, object]:
    """Return what `migrate` did as plain data."""
    return migrations.as_data(done)
