import pytest

from scripts.gloo_world import World


@pytest.fixture(scope="session")
def world():
    """The gloo world that all distributed tests share."""
    world = World()
    yield world
    world.close()
