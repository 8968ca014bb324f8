"""Fixtures: managers and stores of their own for tests that change what is served."""

import pytest

from keras_emr_serving.server.manager import Manager
from keras_emr_serving.server.metrics import Metrics
from tests.serving import toy


@pytest.fixture
def folder(made, tmp_path):
    """A model's folder with version 1."""
    base = tmp_path / "store" / "m"
    base.mkdir(parents=True)
    toy.publish(made / "small", base / "1")
    return base


@pytest.fixture
def manage():
    """Make managers that are closed after the test."""
    managers = []

    def make(*configs, **options):
        managers.append(Manager(configs, Metrics(), **options))
        managers[-1].start()
        return managers[-1]

    yield make
    for one in managers:
        one.close()
