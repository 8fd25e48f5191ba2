"""The brute-force oracle of ``tests/neighborhood_oracle.py`` for the tests of every backend."""

import neighborhood_oracle
import pytest


@pytest.fixture(scope="session")
def oracle():
    """The oracle module: ``random_case``, ``make_inputs``, ``brute_force``, ``assert_exact``, …"""
    return neighborhood_oracle
