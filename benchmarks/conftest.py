"""`--device`, and what `--benchmark-json` says of the machine beside pytest-benchmark's own lines."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from race import commit, environment

from darts_fast import kernels
from darts_fast.precision import strict_float32


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", choices=["cpu", "cuda"], help="where the benchmarks run")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


# Of the session: what a module checks once, before it times anything, is in it, too.
@pytest.fixture(autouse=True, scope="session")
def float32_is_float32() -> Iterator[None]:
    with strict_float32():
        yield


@pytest.fixture
def timed(benchmark: Any, device: torch.device) -> Any:
    """`benchmark.pedantic` that waits for the device at the end of a round."""

    def run(function: Any, args: tuple = (), **options: Any) -> Any:
        def whole(*given: Any) -> Any:
            found = function(*given)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return found

        return benchmark.pedantic(whole, args, **options)

    return run


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    where = torch.device(config.getoption("--device"))
    machine_info.update(environment(where))
    machine_info["threads"] = torch.get_num_threads()
    machine_info["kernels"] = kernels.used(where, torch.float32)


def pytest_benchmark_update_commit_info(config: Any, commit_info: dict[str, Any]) -> None:
    commit_info["describe"] = commit()
