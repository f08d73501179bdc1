"""Checks a wheel that is installed into the venv of this Python: with no compiler on the PATH, every command
of `darts-fast` runs on the C++ kernels, and one OpenMP runtime is in the process.

    pip wheel --no-deps -w DIR . && pip install --force-reinstall --no-deps DIR/*.whl
    python tests/check_wheel.py
"""

import os
import platform
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# The levels that the wheel has, then a step of the C++ kernels, and the OpenMP runtimes in the process.
KERNELS = """
import re, torch, darts_fast
from darts_fast.kernels import native
from darts_fast.kernels.types import Call
x = torch.ones(2, 4, 8, 8).contiguous(memory_format=torch.channels_last)
out = torch.zeros_like(x)
native.program([Call("add", {"terms": (x, x)}, {"out": out})])()
assert (out == 2).all()
print(darts_fast.__file__, [name for key, name in native.LEVELS.items() if native.library._path(key)])
print({line.split()[-1] for line in open("/proc/self/maps") if re.search("lib[gi]?omp", line)})
"""

TINY = "--fused --epochs 1 --init_channels 2 --layers 3 --batch_size 480"
# Each with what it says. Those of a list take what the ones before them left; lists run side by side.
COMMANDS = [
    {
        f"search {TINY} --name one": "kernels: native (C++",
        "search --resume searchs/one": "Genotype(",
        f"train --genotype searchs/one {TINY}": "kernels: native (C++",
        "evaluate augments/digits": "final.pt: test loss",
        "export augments/digits": "wrote 'exports/digits'",
        "draw searchs/one": "wrote 'one.svg'",
    },
    {
        f"profile search {TINY} --profile 1 --name two": "kernels: native (C++",
        "protocol --fused --searches 1 --trainings 1 "
        "--search_settings 'epochs=1 init_channels=2 batch_size=480' "
        "--brief_settings 'epochs=1 init_channels=2 train_portion=0.5' "
        "--train_settings 'epochs=1 init_channels=2 layers=3'": "kernels: native (C++",
    },
]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "bin").mkdir()
        for name in ("sh", "bash", "uname", "ldconfig"):  # what Python's and PyTorch's own modules may call
            for place in ("/bin", "/sbin"):
                if os.path.exists(f"{place}/{name}"):
                    os.symlink(f"{place}/{name}", f"{folder}/bin/{name}")
                    break
        environment = {**os.environ, "PATH": f"{folder}/bin"}

        def run(command: list[str]) -> str:
            done = subprocess.run(
                command,
                cwd=folder,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            assert done.returncode == 0, done.stdout
            return done.stdout

        kernels, runtimes = run([sys.executable, "-c", KERNELS]).splitlines()
        print(kernels, runtimes, sep="\n")
        assert str(ROOT) not in kernels, "this is the checkout, no wheel"
        expected = ["x86-64-v4", "x86-64-v3", "portable"] if platform.machine() == "x86_64" else ["portable"]
        assert str(expected) in kernels, "a level was not compiled"
        assert runtimes.count("'") == 2 and "torch" in runtimes, "not one OpenMP runtime, PyTorch's"
        program = str(Path(sys.executable).with_name("darts-fast"))

        def check(commands: dict[str, str]) -> None:
            for command, expected_words in commands.items():
                words = [word.strip("'") for word in re.findall(r"'[^']*'|\S+", command)]
                said = run([program, *words])
                assert expected_words in said, said
                print("ok: darts-fast", command)

        with ThreadPoolExecutor() as pool:
            list(pool.map(check, COMMANDS))


if __name__ == "__main__":
    main()
