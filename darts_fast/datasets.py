"""The data sets: each reader turns files on the disk into a `Dataset`, or says in one sentence why not."""

import difflib
import gzip
import math
import os
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from darts_fast.config import FOLDER_IMAGE_SIZE, Config
from darts_fast.data import Dataset, ImageFiles, from_tensors
from darts_fast.distributed import local_world_size
from darts_fast.errors import DamagedImage, InputError, first_line


def load(name: str, path: str | Path, image_size: int | None = None, stream: bool | None = False) -> Dataset:
    """The data set of that name (any case), from files below `path`.

    Args:
        image_size: the side of the square images of `folder` (None: 32); other data sets have their own.
        stream: whether the images of `folder` stay in their files; None: where they would take more than
            half of the memory.

    Raises:
        InputError: no such data set, or its files are absent or damaged and cannot be downloaded.
    """
    path = Path(os.path.expanduser(path))  # unlike Path's, it leaves what it does not know as it is
    if name.lower() == "folder":
        return _folder(path, image_size or FOLDER_IMAGE_SIZE, stream)
    if name.lower() not in READERS:
        names = [*READERS, "folder"]
        likely = difflib.get_close_matches(name.lower(), names, n=1)
        guess = f" (did you mean {likely[0]}?)" if likely else ""
        raise InputError(f"there is no data set {name!r}{guess}; there are {', '.join(names)}")
    return READERS[name.lower()](path)


def read_data(config: Config, data: tuple[Tensor, ...] | None, resumed: str | Path | None = None) -> Dataset:
    """The user's own tensors as in `from_tensors`, or else the data set that the settings name. A new run
    streams where the data do not fit in memory; one that is resumed only where it began with it.

    Raises:
        InputError: it cannot be read; or the run folder that is `resumed` began with the other kind.
    """
    if data is not None and len(data) not in (2, 4):
        raise InputError("data must be images and labels, or both twice: to train and to test")
    if resumed is not None and (config.dataset == "tensors") != (data is not None):
        raise InputError(
            f"{resumed} began with tensors, so it needs the same data, given from Python"
            if data is None
            else f"{resumed} began with {config.dataset}, so it takes no data"
        )
    if data is not None:
        return from_tensors(*data)
    stream = config.stream or (None if resumed is None else False)
    return load(config.dataset, config.data_path, config.image_size, stream)


def _digits(path: Path) -> Dataset:
    """scikit-learn's 1,797 images of 8x8 pixels: 1,437 to train, 360 to test, always the same."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)  # 0 to 16
    images = torch.from_numpy(np.rint(pixels * (255 / 16)).astype(np.uint8)).view(-1, 1, 8, 8)
    labels = torch.from_numpy(labels).long()
    # Drawn at random: the digits come in order (0 1 2 ...), and from one writer after the other.
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(labels)))
    train, test = order[:1437], order[1437:]
    # Not augmented: a shift by one pixel is an eighth of the image, and a mirrored digit is another sign.
    return Dataset(
        "digits", images[train], labels[train], images[test], labels[test], 10, crop_padding=0, flip=False
    )


# Published files, in torchvision's layout and downloaded by it


def _cifar(name: str, classes: int, path: Path) -> Dataset:
    """50,000 + 10,000 photographs of 32x32 pixels. The files are pickles: none is opened before its MD5 is
    found to be the published one.
    """
    from torchvision import datasets

    reader = getattr(datasets, name.upper())
    published = [*reader.train_list, *reader.test_list, [reader.meta["filename"], reader.meta["md5"]]]
    files = {path / reader.base_folder / file: md5 for file, md5 in published}
    _bring(name, files, lambda: reader(path, download=True))
    splits = [reader(path, train=train) for train in (True, False)]
    images = [torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous() for split in splits]
    labels = [torch.tensor(split.targets) for split in splits]
    return Dataset(name, images[0], labels[0], images[1], labels[1], classes, crop_padding=4, flip=True)


def _mnist(reader_name: str, flip: bool, path: Path) -> Dataset:
    """60,000 + 10,000 grey images of 28x28 pixels, from `<reader_name>/raw/*-ubyte.gz` or the same files
    extracted. Only the former have a published MD5; of the latter the structure is checked.
    """
    from torchvision import datasets

    name, reader = reader_name.lower(), getattr(datasets, reader_name)
    published = {path / reader_name / "raw" / file: md5 for file, md5 in reader.resources}
    # os.path's isfile, unlike Path's, is false of a path that is too long or forbidden.
    extracted = {f for f in published if not os.path.isfile(f) and os.path.isfile(f.with_suffix(""))}
    files = {file: md5 for file, md5 in published.items() if file not in extracted}
    _bring(name, files, lambda: reader(path, download=True))
    arrays = []
    for file, dimensions in zip(published, (3, 1, 3, 1), strict=True):  # images, labels, of both splits
        arrays.append(_read_idx(file.with_suffix("") if file in extracted else file, dimensions))
    images, labels, test_images, test_labels = arrays
    if (
        len(images) != len(labels)
        or len(test_images) != len(test_labels)
        or images.shape[1:] != test_images.shape[1:]
        or max(labels.max(initial=0), test_labels.max(initial=0)) > 9
    ):
        raise InputError(
            f"{name}: the files in {path / reader_name / 'raw'} do not belong together "
            f"(images {images.shape} and {test_images.shape}, labels {labels.shape} and {test_labels.shape}, "
            "from 0 to 9); put the published files there"
        )
    # A digit lies in a box of 20x20, so that a shift by 4 hardly cuts it; mirrored it is another sign.
    return Dataset(
        name,
        torch.from_numpy(images)[:, None],
        torch.from_numpy(labels).long(),
        torch.from_numpy(test_images)[:, None],
        torch.from_numpy(test_labels).long(),
        10,
        crop_padding=4,
        flip=flip,
    )


LARGEST_IDX = 2**30  # bytes; the published ones have 47 million at most


def _read_idx(file: Path, dimensions: int) -> np.ndarray:
    """The uint8 array of an IDX file: 0, 0, 8 (bytes), number of dimensions, their big-endian sizes, data.

    Raises:
        InputError: it is not that, or is longer or shorter than it says.
    """
    start, shape, content = 4 + 4 * dimensions, [], b""
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as stream:
            header = stream.read(start)
            if len(header) == start and header[:4] == bytes([0, 0, 8, dimensions]):
                shape = np.frombuffer(header[4:], ">u4").tolist()
                content = stream.read(min(math.prod(shape), LARGEST_IDX) + 1)  # a file may be of any length
    except (OSError, EOFError, MemoryError, zlib.error) as error:
        raise InputError(f"{file} could not be read ({first_line(error)})") from error
    if not shape or len(content) != math.prod(shape):
        raise InputError(
            f"{file} is damaged (it is no IDX file of {dimensions} dimensions, or its length is not what "
            "its header says); put the published file there"
        )
    return np.frombuffer(content, np.uint8).reshape(shape).copy()


def _svhn(path: Path) -> Dataset:
    """73,257 + 26,032 photographs of house numbers, 32x32 pixels, from `{train,test}_32x32.mat`."""
    from torchvision.datasets import SVHN

    files = {path / SVHN.split_list[split][1]: SVHN.split_list[split][2] for split in ("train", "test")}
    _bring("svhn", files, lambda: [SVHN(path, split, download=True) for split in ("train", "test")])
    splits = [SVHN(path, split) for split in ("train", "test")]
    images = [torch.from_numpy(np.ascontiguousarray(split.data)) for split in splits]
    labels = [torch.from_numpy(split.labels) for split in splits]
    return Dataset("svhn", images[0], labels[0], images[1], labels[1], 10, crop_padding=4, flip=False)


READERS: dict[str, Callable[[Path], Dataset]] = {
    "digits": _digits,
    "cifar10": partial(_cifar, "cifar10", 10),
    "cifar100": partial(_cifar, "cifar100", 100),
    "mnist": partial(_mnist, "MNIST", False),
    "fashionmnist": partial(_mnist, "FashionMNIST", True),
    "svhn": _svhn,
}


def _bring(name: str, files: dict[Path, str], download: Callable[[], object]) -> None:
    """Sees to it that all files (with their MD5) are there as published; downloads them if any is absent.

    Raises:
        InputError: a file is there and is another, or is absent and could not be downloaded.
    """
    from torchvision.datasets.utils import check_integrity

    absent, made = list(files), set()
    try:
        absent = [file for file in files if not file.exists()]
        damaged = [file for file in files if file not in absent and not check_integrity(file, files[file])]
        if damaged:
            raise InputError(
                f"{name}: {', '.join(map(str, damaged))} is damaged (its MD5 is not the published one); "
                "delete it or put the published file there"
            )
        made = {folder for file in absent for folder in file.parents if not folder.exists()}
        if absent:
            download()
        if not all(check_integrity(file, files[file]) for file in absent):
            raise RuntimeError("the download brought other files")
    except (OSError, RuntimeError, HTTPException) as error:  # the disk's, torchvision's own, the network's
        for folder in sorted(made, reverse=True):  # what a failed download made
            with suppress(OSError):
                folder.rmdir()
        raise InputError(
            f"{name}: {', '.join(map(str, absent or files))} could not be read or downloaded "
            f"({' '.join(str(error).split())}); put the published files there, or name their folder with "
            "--data_path"
        ) from error


# A person's own images

LAYOUT = (
    "images belong in train/CLASS/ and test/CLASS/ (or val/CLASS/), or all in CLASS/, below the folder of "
    "--data_path"
)
# Pillow knows more formats; one of them, PostScript, would be run as a program.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
DECODED_AT_ONCE = 1024  # files handed to the threads together; bounds what waits in memory


def _folder(path: Path, image_size: int, stream: bool | None) -> Dataset:
    """Images in `train/CLASS/` and `test/CLASS/` (or `val/CLASS/`, as ImageNet's are); else in `CLASS/`,
    where a fifth of each class is the test split, always the same. The classes are the names of the folders,
    sorted.
    """
    other = next((name for name in ("test", "val") if os.path.isdir(path / name)), None)
    if other and os.path.isdir(path / "train"):
        train, test = _class_files(path / "train"), _class_files(path / other)
        if train.keys() != test.keys():
            one_sided = sorted(train.keys() ^ test.keys())
            raise InputError(
                f"{_shown(path)}: train and {other} must hold the same classes, and only one of them holds "
                f"{', '.join(map(_shown, one_sided))}"
            )
    else:
        train, test = {}, {}
        rng = np.random.RandomState(0)  # not --seed: no run may train on what another is tested on
        for name, files in _class_files(path).items():
            tested = set(rng.permutation(len(files))[: len(files) // 5].tolist())
            train[name] = [file for i, file in enumerate(files) if i not in tested]
            test[name] = [file for i, file in enumerate(files) if i in tested]
    why = "--stream" if stream else _too_large([*train.values(), *test.values()], image_size, stream)
    read = partial(_image_files, root=path) if why else _read_images
    images, labels = read(train, image_size=image_size)
    test_images, test_labels = read(test, image_size=image_size)
    return Dataset(
        "folder",
        images,
        labels,
        test_images,
        test_labels,
        len(train),
        crop_padding=image_size // 8,
        flip=True,
        streamed=why,
    )


def _too_large(classes: list[list[Path]], image_size: int, stream: bool | None) -> str | None:
    """Why images of that size are not read into memory, where that is asked (`stream` is None) and so."""
    images = sum(map(len, classes))
    needed, there = images * 3 * image_size**2, memory() / local_world_size()
    if stream is False or needed <= there / 2:
        return None
    return (
        f"{images:,} images of {image_size} x {image_size} would take {needed / 1e9:.3g} GB, more than half "
        f"of the {there / 1e9:.3g} GB that a process has here"
    )


def memory() -> float:
    """Bytes of this machine, or of its container where that has less; infinite where the system does not say.
    It is not what is free now: a run shall do the same when it is begun again."""
    found = [math.inf]
    with suppress(AttributeError, OSError, ValueError):  # Windows has none
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):  # of control groups, versions 2 and 1
        with suppress(OSError, ValueError):  # no such file, or "max"
            found.append(int(Path("/sys/fs/cgroup", limit).read_text()))
    return min(found)


def _image_files(classes: dict[str, list[Path]], image_size: int, root: Path) -> tuple[ImageFiles, Tensor]:
    """All files in the order of `classes`, and their labels, int64 [N]."""
    names = [os.fsencode(file.relative_to(root)) for files in classes.values() for file in files]
    return ImageFiles(root, np.array(names, dtype=np.bytes_), image_size), _labels(classes)


def _labels(classes: dict[str, list[Path]]) -> Tensor:
    """int64 [N], of all files in the order of `classes`."""
    counts = [len(of_class) for of_class in classes.values()]
    return torch.from_numpy(np.repeat(np.arange(len(classes)), counts)).long()


def _class_files(folder: Path) -> dict[str, list[Path]]:
    """The files of every folder in `folder`, both sorted by name; what starts with a dot is not there.

    Raises:
        InputError: there is no class, an empty class, or something in a class that is no file.
    """
    files: dict[str, list[Path]] = {}
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")
        for name in names:
            entries = sorted(os.scandir(folder / name), key=lambda entry: entry.name)
            files[name] = []
            for entry in entries:
                if entry.name[0] == ".":
                    continue
                if not entry.is_file():  # a folder, or a pipe, which would wait for ever when opened
                    raise InputError(f"{_shown(entry.path)} is not a file; {LAYOUT}")
                files[name].append(Path(entry.path))
            if not files[name]:
                raise InputError(f"{_shown(folder / name)} holds no images; {LAYOUT}")
    except OSError as error:
        raise InputError(f"{_shown(folder)} could not be read ({error}); {LAYOUT}") from error
    if not files:
        raise InputError(f"{_shown(folder)} holds no folders of images; {LAYOUT}")
    return files


def _read_images(classes: dict[str, list[Path]], image_size: int) -> tuple[Tensor, Tensor]:
    """uint8 [N, 3, image_size, image_size], and int64 [N], of all files in the order of `classes`."""
    files = [file for of_class in classes.values() for file in of_class]
    try:
        images = np.empty((len(files), 3, image_size, image_size), np.uint8)
    except MemoryError as error:
        raise InputError(
            f"{len(files)} images of {image_size} x {image_size} do not fit in memory; choose a smaller "
            "--image_size"
        ) from error

    with (
        only_bombs_warned_of(),
        ThreadPoolExecutor() as pool,
        tqdm(total=len(files), desc="reading images", unit="image", disable=None, leave=False) as bar,
    ):
        for start in range(0, len(files), DECODED_AT_ONCE):
            some = files[start : start + DECODED_AT_ONCE]
            for index, image in enumerate(pool.map(partial(_read_image, size=image_size), some), start):
                images[index] = image
                bar.update()
    return torch.from_numpy(images), _labels(classes)


def _read_image(file: Path, size: int) -> np.ndarray:
    """uint8 [3, size, size]: the largest centred square of `opened`, resized (bilinear with antialiasing).

    Raises:
        InputError: as `opened`.
    """
    from PIL import Image, ImageOps

    try:
        image = ImageOps.fit(opened(file), (size, size), Image.Resampling.BILINEAR)
    except DamagedImage as error:
        raise InputError(f"{error}; repair or remove it") from error
    return np.asarray(image).transpose(2, 0, 1)


@contextmanager
def only_bombs_warned_of() -> Iterator[None]:
    """Within, Pillow's warnings of oddities in files that can be read are not shown, and its warning of an
    image too large to be meant is an error, as `opened` needs it."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def opened(file: Path) -> Any:
    """An image file as Pillow's image of mode RGB: turned as its EXIF says; transparency is dropped; of 16
    bits the upper eight, of an animation the first frame. Called within `only_bombs_warned_of`.

    Raises:
        DamagedImage: the file is no image, damaged, or too large to be meant.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(file, formats=FORMATS) as lazy:
            image = ImageOps.exif_transpose(lazy)
            if image.mode[0] in "IF":  # grey of more than 8 bits, which Pillow's conversion clips, not scales
                pixels = np.asarray(image)
                if pixels.dtype.kind == "f" or pixels.min() < 0 or pixels.max() > 65535:
                    raise ValueError("its pixels are neither of 8 nor of 16 bits")
                image = Image.fromarray((pixels >> 8).astype(np.uint8))
            return image.convert("RGB")
    except Exception as error:  # a broken file makes Pillow raise nearly anything
        if isinstance(error, Image.DecompressionBombWarning | Image.DecompressionBombError):
            reason = f"it has more than {Image.MAX_IMAGE_PIXELS} pixels"
        elif isinstance(error, Image.UnidentifiedImageError):
            reason = f"it is none of {', '.join(FORMATS)}"
        else:
            reason = " ".join(str(error).split()) or type(error).__name__
        raise DamagedImage(f"{_shown(file)} could not be read as an image ({reason})") from error


def _shown(path: str | Path) -> str:
    """The path as a part of one line, even where its name has a line break."""
    return str(path) if str(path).isprintable() else ascii(str(path))
