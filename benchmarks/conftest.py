"""What `--benchmark-json` says of the machine beside pytest-benchmark's own lines."""

from typing import Any

import torch
from step import commit, processor

from darts_fast import kernels


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["device"] = processor()
    machine_info["kernels"] = kernels.used(torch.empty(0))
    machine_info["commit"] = commit()
