"""The processes that the tests of this folder share."""

from __future__ import annotations

import pytest
from ranks import Ranks


@pytest.fixture(scope="session")
def _rooms(tmp_path_factory):
    """The running processes, if any; started when a test first asks for them, and again after a
    test that failed in them.
    """
    running: list[Ranks] = []
    yield running, tmp_path_factory
    for ranks in running:
        ranks.close()


@pytest.fixture
def ranks(_rooms) -> Ranks:
    running, folders = _rooms
    if not running or not running[-1].alive:
        running[:] = [Ranks(folders.mktemp("ranks"))]
    return running[-1]
