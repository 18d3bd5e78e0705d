"""Two notebooks at a time: those that build on each other's files stay in one process, in order."""

import pytest

TEXT = ("06", "07", "08")  # language models; the others share the mixture


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items):
    """Group the notebooks for `--dist loadgroup`."""
    for item in items:
        group = "text" if item.path.name[:2] in TEXT else "pictures"
        item.add_marker(pytest.mark.xdist_group(group))
