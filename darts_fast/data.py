"""Data sets as uint8 tensors on the device; batches are cut, augmented and normalised there."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from darts_fast.errors import InputError

SIZE_MULTIPLE = 4  # the two factorized reductions halve the image twice and need even sizes
SMALLEST_SIZE = 8


@dataclass(frozen=True)
class Dataset:
    """A labelled set of images, on the host.

    images, test_images: uint8 [N, channels, height, width]; labels, test_labels: int64 [N], from 0 to
    classes - 1. A search never sees the test split. `crop_padding` is the number of black pixels that a
    random crop may shift the image by; `flip` says whether a mirrored image is still of its class.
    """

    name: str
    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: int
    crop_padding: int
    flip: bool


def load(name: str, path: str | Path) -> Dataset:
    """The data set of that name (any case), from files below `path`.

    Raises:
        InputError: no such data set, or its files are absent or damaged and cannot be downloaded.
    """
    reader = READERS.get(name.lower())
    if reader is None:
        raise InputError(f"there is no data set {name!r}; there are {', '.join(READERS)}")
    return reader(Path(path))


def from_tensors(images: Tensor, labels: Tensor) -> Dataset:
    """A user's own tensors as a training set without a test split.

    images: uint8 [N, channels, H, W]; labels: integers [N]. Crops shift by an eighth of the height (4 at 32);
    images of three channels are flipped (photographs), others are not (digits, letters).

    Raises:
        InputError: a dtype, shape or value is other than that.
    """
    if not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.ndim != 4:
        raise InputError("data's images must be a uint8 tensor [N, channels, height, width]")
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.shape != images.shape[:1]:
        raise InputError("data's labels must be an integer tensor with one label an image")
    if not images.shape[1]:
        raise InputError("data's images must have a channel at least")
    if len(labels) and int(labels.min()) < 0:
        raise InputError("data's labels must be 0 or more")
    classes = int(labels.max()) + 1 if len(labels) else 0
    return Dataset(
        "tensors",
        images.cpu().contiguous(),
        labels.cpu().long().contiguous(),
        images[:0].cpu(),
        labels[:0].cpu().long(),
        classes,
        crop_padding=images.shape[2] // 8,
        flip=images.shape[1] == 3,
    )


def check_for_network(dataset: Dataset, multiple: int = SIZE_MULTIPLE) -> None:
    """Raises InputError where a network of two reductions cannot take the images."""
    height, width = dataset.images.shape[2:]
    if height % SIZE_MULTIPLE or width % SIZE_MULTIPLE or min(height, width) < SMALLEST_SIZE:
        raise InputError(
            f"images of {dataset.name} are {height} x {width}; both sides must be divisible by "
            f"{SIZE_MULTIPLE} and at least {SMALLEST_SIZE}, because two cells halve them"
        )
    if len(dataset.labels) < 4 or dataset.classes < 2:
        raise InputError(
            f"{dataset.name} has {len(dataset.labels)} images of {dataset.classes} classes; "
            "a network needs at least 4 images of 2 classes"
        )


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


def _cifar10(path: Path) -> Dataset:
    """The 50,000 + 10,000 images of 32x32 pixels, from torchvision's files (MD5 checked)."""
    from torchvision.datasets import CIFAR10

    published = [*CIFAR10.train_list, *CIFAR10.test_list, [CIFAR10.meta["filename"], CIFAR10.meta["md5"]]]
    files = [(path / CIFAR10.base_folder / name, md5) for name, md5 in published]
    train, test = _torchvision_splits("cifar10", CIFAR10, path, files)
    images, test_images = (
        torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous() for split in (train, test)
    )
    labels, test_labels = (torch.tensor(split.targets) for split in (train, test))
    return Dataset("cifar10", images, labels, test_images, test_labels, 10, crop_padding=4, flip=True)


def _torchvision_splits(
    name: str, reader: Callable, path: Path, files: list[tuple[Path, str]]
) -> tuple[object, object]:
    """torchvision's training and test split; downloads what is absent, names what is wrong."""
    from torchvision.datasets.utils import check_integrity

    absent = [path]
    try:
        absent = [file for file, _ in files if not file.exists()]
        damaged = [file for file, md5 in files if file.exists() and not check_integrity(file, md5)]
        if damaged:
            raise InputError(
                f"{name}: {', '.join(map(str, damaged))} is damaged (its MD5 is not the published one); "
                "delete it or put the published file there"
            )
        train = reader(path, train=True, download=bool(absent))
        return train, reader(path, train=False)
    except (OSError, RuntimeError, HTTPException) as error:  # the disk's, torchvision's own, the network's
        raise InputError(
            f"{name}: {', '.join(map(str, absent or [path]))} could not be read or downloaded ({error}); "
            "put the published files there, or name their folder with --data_path"
        ) from error


READERS: dict[str, Callable[[Path], Dataset]] = {"digits": _digits, "cifar10": _cifar10}


def fits(images: Tensor, device: torch.device) -> bool:
    """Whether a third of the device's free memory holds the images; the rest is the network's."""
    return device.type == "cpu" or images.nbytes <= torch.cuda.mem_get_info(device)[0] / 3


class Batches:
    """Cuts normalised float32 batches [n, channels, H, W] from a data set that lies on the device.

    Args:
        images, labels: uint8 [N, channels, H, W] and int64 [N]. Moved to `device` where they fit in a
            third of its free memory; else they stay on the host and each batch travels, pinned.
        statistics: mean and standard deviation a channel, in units of a pixel value from 0 to 255.
        generator: of `device`; every random number of the augmentation comes from it.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        device: torch.device,
        statistics: tuple[Tensor, Tensor],
        generator: torch.Generator,
        crop_padding: int = 0,
        flip: bool = False,
        cutout_length: int = 0,
    ):
        self.device, self.generator = device, generator
        where = device if fits(images, device) else torch.device("cpu")
        self.images, self.labels = images.to(where), labels.to(where)
        self.mean, self.std = (t.float().view(1, -1, 1, 1).to(device) for t in statistics)
        self.crop_padding, self.flip, self.cutout_length = crop_padding, flip, cutout_length

    def cut(self, indices: Tensor, augment: bool) -> tuple[Tensor, Tensor]:
        """The images (float32, normalised) and labels of these indices (int64 [n], on the host)."""
        indices = indices.to(self.images.device)
        images, labels = self._on_device(self.images[indices]), self._on_device(self.labels[indices])
        if augment:
            images = self._crop_and_flip(images)
        images = (images.float() - self.mean) / self.std
        if augment and self.cutout_length:
            images = images * self._cutout_mask(images)
        return images, labels

    def _on_device(self, batch: Tensor) -> Tensor:
        if batch.device.type == "cpu" and self.device.type == "cuda":
            batch = batch.pin_memory()  # so that its way to the device does not hold up the host
        return batch.to(self.device, non_blocking=True)

    def _crop_and_flip(self, images: Tensor) -> Tensor:
        """Crops at a random place of the image padded with black, then mirrors half of them."""
        n, channels, height, width = images.shape
        pad = self.crop_padding
        padded = torch.nn.functional.pad(images, (pad, pad, pad, pad))
        top, left = (self._draw(2 * pad + 1, n) for _ in range(2))
        rows = top[:, None] + torch.arange(height, device=self.device)
        columns = torch.arange(width, device=self.device).expand(n, width)
        if self.flip:
            mirrored = self._draw(2, n).bool()
            columns = torch.where(mirrored[:, None], width - 1 - columns, columns)
        columns = left[:, None] + columns
        image = torch.arange(n, device=self.device)
        picked = padded.permute(0, 2, 3, 1)[image[:, None, None], rows[:, :, None], columns[:, None, :]]
        return picked.permute(0, 3, 1, 2).contiguous()

    def _cutout_mask(self, images: Tensor) -> Tensor:
        """1, and 0 in a square around a random pixel, clipped at the border (arXiv 1708.04552)."""
        n, _, height, width = images.shape
        half = self.cutout_length // 2
        inside = []
        for size in (height, width):
            centre = self._draw(size, n)[:, None]
            position = torch.arange(size, device=self.device)
            inside.append((position >= centre - half) & (position < centre + half))
        square = inside[0][:, :, None] & inside[1][:, None, :]
        return (~square)[:, None].to(images.dtype)

    def _draw(self, below: int, n: int) -> Tensor:
        """n random integers from 0 to below - 1."""
        return torch.randint(below, (n,), generator=self.generator, device=self.device)


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (float64 [channels], in pixel values) of uint8 images [N, channels, H, W].

    Exact: from a histogram. A channel that never changes gets 1 for its deviation.
    """
    value = torch.arange(256, dtype=torch.float64)
    means, deviations = [], []
    for channel in images.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean = (share * value).sum()
        deviation = (share * (value - mean) ** 2).sum().sqrt()
        means.append(mean)
        deviations.append(deviation if deviation > 0 else torch.ones_like(deviation))
    return torch.stack(means), torch.stack(deviations)


def seeded(device: torch.device | str, *seed: int) -> torch.Generator:
    """A generator whose stream depends on nothing but the numbers in `seed` (and the kind of device)."""
    state = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0])
    return torch.Generator(device).manual_seed(state >> 1)  # at most 63 bits


def permutation(size: int, *seed: int) -> Tensor:
    """A random order of range(size), int64, that depends on nothing but the numbers in `seed`."""
    return torch.randperm(size, generator=seeded("cpu", *seed))


def fingerprint(dataset: Dataset) -> int:
    """A checksum of the training images and labels: is a run resumed on the data it began with?"""
    return zlib.crc32(dataset.labels.numpy(), zlib.crc32(dataset.images.contiguous().numpy()))
