from pathlib import Path

from setuptools import setup

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
test_requirements = [
    "pytest",
    "pytest-xdist",  # a worker a core
    "hypothesis",  # random genotypes and random damage to them, against the grammar
    "ruff",  # lint, also run by CI
]

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
    packages=["darts_fast", "darts_fast.kernels"],
    package_dir={"darts_fast": "darts_fast", "darts_fast.kernels": "kernels"},
    install_requires=requirements,
    extras_require={"test": test_requirements},
)
