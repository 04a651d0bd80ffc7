"""Imported once by the fork server, so that no worker pays for importing torch and lm_eval again."""

import evomerge.evaluation.harness
import evomerge.merging.live.workbench  # noqa: F401
