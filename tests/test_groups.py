"""Tests that share something costly run in one process."""

import pytest


@pytest.mark.xdist_group("groups")
def test_groups_are_kept_together(request):
    if not getattr(request.config.option, "loadgroup", False):
        pytest.skip("runs without --dist loadgroup")
    # By this suffix pytest-xdist knows where a test belongs.
    assert request.node.nodeid.endswith("@groups")
