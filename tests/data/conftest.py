"""A cache of its own for every test, so that none sees what another wrote; `network` tests share the user's."""

import pytest


@pytest.fixture(autouse=True)
def cache(request, tmp_path, monkeypatch):
    """The cache folder; the network is off unless the test is marked `network`."""
    if request.node.get_closest_marker("network"):
        monkeypatch.delenv("JAXPEFT_OFFLINE", raising=False)
        return None
    folder = tmp_path / "cache"
    monkeypatch.setenv("JAXPEFT_CACHE", str(folder))
    monkeypatch.setenv("JAXPEFT_OFFLINE", "1")
    return folder
