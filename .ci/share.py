"""A pytest plugin: of the tests found, runs the share that --share names, such as 0,1/3."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--share", default="0/1", help="REMAINDERS/DIVISOR of a test's number")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    remainders, _, divisor = str(config.getoption("--share")).partition("/")
    wanted = {int(remainder) for remainder in remainders.split(",")}
    items[:] = [item for number, item in enumerate(items) if number % int(divisor) in wanted]
