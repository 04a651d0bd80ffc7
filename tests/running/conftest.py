"""A Ray cluster for all tests of a session: starting one takes longer than most tests."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Any]:
    """A real cluster on this machine, with one node of eight places, that this process is connected to."""
    from evomerge.running.executors import ray_actors

    os.environ |= ray_actors.SETTINGS  # read when Ray is imported
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray = pytest.importorskip("ray")
        from ray.cluster_utils import Cluster

        store = {"object_store_memory": ray_actors.OBJECT_STORE_BYTES}
        cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 8, "include_dashboard": False, **store}
        )
        ray.init(address=cluster.address, logging_level=logging.ERROR, log_to_driver=False)
        yield cluster
        ray.shutdown()
        cluster.shutdown()
