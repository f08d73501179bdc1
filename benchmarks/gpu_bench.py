"""What every section of gpu_report.py is given, and how it times a call."""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import race
import torch

Part = dict[str, Any]  # what a section has found so far; it is written by `save`


class Bench:
    """What a section is given: the arguments, the device, the setting, and its part of the report."""

    def __init__(self, args: argparse.Namespace, path: Path, seconds: float):
        self.args, self.path, self.end = args, path, time.monotonic() + seconds
        self.device, self.quick = torch.device(args.device), args.quick
        self.cuda = self.device.type == "cuda"
        self.setting = race.Setting(2, 4, 3, 8, 1) if args.quick else race.Setting(64, 16, 8, 32, 1)
        self.part: Part = {}

    def left(self) -> float:
        """Seconds until the section is stopped."""
        return self.end - time.monotonic()

    def save(self) -> None:
        """Whole or not at all: the section may be killed while it writes."""
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.part))
        part.replace(self.path)

    def table(self, name: str, header: list[str], rows: list[list[str]]) -> None:
        self.part.setdefault("tables", {})[name] = [header, rows]
        self.save()

    def fact(self, name: str, value: object) -> None:
        self.part.setdefault("facts", {})[name] = value
        self.save()

    def results(self, section: str) -> Part:
        """What an earlier section found: {} where it found nothing."""
        path = self.path.with_name(f"{section}.json")
        return json.loads(path.read_text()) if path.exists() else {}


def timed(call: Callable[[], object], cuda: bool, repeats: int, inner: int) -> float:
    """Seconds of a call, p50. On CUDA `inner` calls are captured as one graph, so that what is timed is the
    device and not the host that launches; caches are as the call before left them."""
    call()
    if not cuda:
        found = []
        for _ in range(repeats):
            start = time.perf_counter()
            for _ in range(inner):
                call()
            found.append((time.perf_counter() - start) / inner)
        return median(found)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(inner):
            call()
    graph.replay()
    found = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / 1e3 / inner)
    return median(found)
