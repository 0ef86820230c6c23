import os
import tempfile

import pytest

from scripts.gloo_world import World

# What inductor compiles is kept in a folder of the test run, not in the machine's cache.
_COMPILED = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _COMPILED.name


@pytest.fixture(scope="session")
def world():
    """The gloo world that all distributed tests share."""
    world = World()
    yield world
    world.close()
