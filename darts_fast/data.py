"""A data set as uint8 tensors on the device; batches are cut, augmented and normalised there. (Images that
stay in their files are in `stream`.)"""

import os
import zlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from darts_fast.errors import InputError

Walk = Generator[tuple[Tensor, Tensor], None, None]  # images and labels, batch by batch; can be closed


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Image files in place of a tensor of images [N, 3, image_size, image_size]: each is decoded when a batch
    needs it.

    names: paths relative to `root`, as one array of bytes (N x the longest of them), which worker processes
    share: a list of Python's strings each of them would come to copy.
    """

    root: Path
    names: np.ndarray
    image_size: int
    dtype: ClassVar[torch.dtype] = torch.uint8

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.names), 3, self.image_size, self.image_size))

    def path(self, index: int) -> Path:
        return self.root / os.fsdecode(self.names[index])


@dataclass(frozen=True)
class Dataset:
    """A labelled set of images, on the host.

    images, test_images: uint8 [N, channels, height, width]; labels, test_labels: int64 [N], from 0 to
    classes - 1. A search never sees the test split. `crop_padding` is the number of black pixels that a
    random crop may shift the image by; `flip` says whether a mirrored image is still of its class. Images may
    also be files, of both splits then: `streamed` says why.
    """

    name: str
    images: Tensor | ImageFiles
    labels: Tensor
    test_images: Tensor | ImageFiles
    test_labels: Tensor
    classes: int
    crop_padding: int
    flip: bool
    streamed: str | None = None


def from_tensors(
    images: Tensor, labels: Tensor, test_images: Tensor | None = None, test_labels: Tensor | None = None
) -> Dataset:
    """A user's own tensors as a data set; without a test split, its test tensors are empty.

    images, test_images: uint8 [N, channels, H, W], channels and sizes the same in both; labels, test_labels:
    integers [N]. The classes are 0 to the largest training label. Crops shift by an eighth of the height (4
    at 32); images of three channels are flipped (photographs), others are not (digits, letters).

    Raises:
        InputError: a dtype, shape or value is other than that, or half of a test split is missing.
    """
    _check_tensors("", images, labels)
    classes = int(labels.max()) + 1 if len(labels) else 0
    if test_images is None and test_labels is None:
        test_images, test_labels = images[:0], labels[:0]
    if test_images is None or test_labels is None:
        raise InputError("data's test images and test labels must be given together")
    _check_tensors("test ", test_images, test_labels)
    if test_images.shape[1:] != images.shape[1:]:
        shapes = [" x ".join(map(str, tensor.shape[1:])) for tensor in (test_images, images)]
        raise InputError(f"data's test images are {shapes[0]} and its images {shapes[1]}; they must agree")
    if len(test_labels) and int(test_labels.max()) >= classes:
        raise InputError(f"data's test labels must be below {classes}, the number of classes of its labels")
    return Dataset(
        "tensors",
        images.cpu().contiguous(),
        labels.cpu().long().contiguous(),
        test_images.cpu().contiguous(),
        test_labels.cpu().long().contiguous(),
        classes,
        crop_padding=images.shape[2] // 8,
        flip=images.shape[1] == 3,
    )


def _check_tensors(split: str, images: Tensor, labels: Tensor) -> None:
    """`split` is "" or "test ", for the sentence."""
    if not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.ndim != 4:
        raise InputError(f"data's {split}images must be a uint8 tensor [N, channels, height, width]")
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
        raise InputError(f"data's {split}labels must be an integer tensor with one label an image")
    if labels.shape != images.shape[:1]:
        shape = tuple(labels.shape)
        raise InputError(
            f"data's {split}labels must be one label an image, {len(images)} in one row, not {shape}"
        )
    if not images.shape[1]:
        raise InputError(f"data's {split}images must have a channel at least")
    if len(labels) and int(labels.min()) < 0:
        raise InputError(f"data's {split}labels must be 0 or more")


def check_for_network(dataset: Dataset, multiple: int = 4) -> None:
    """Raises InputError where a network cannot take the images.

    `multiple`: by how much the network shrinks them, a power of two. 4: two reduction cells; 32: and the stem
    for ImageNet, which halves three times more. The sides must be divisible by it, because a factorized
    reduction needs even sizes, and leave two pixels at the end.
    """
    height, width = dataset.images.shape[2:]
    if height % multiple or width % multiple or min(height, width) < 2 * multiple:
        raise InputError(
            f"images of {dataset.name} are {height} x {width}; both sides must be divisible by {multiple} "
            f"and at least {2 * multiple}, because the network halves them {multiple.bit_length() - 1} times"
        )
    if len(dataset.labels) < 4 or dataset.classes < 2:
        raise InputError(
            f"{dataset.name} has {len(dataset.labels)} images of {dataset.classes} classes; "
            "a network needs at least 4 images of 2 classes"
        )


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

    waited = 0.0  # seconds in which `picked` waited for images: none, they are in memory

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

    def placed(self, order: Tensor) -> Tensor:
        """An epoch's order (int64 [N]), moved to where the images lie. Moved batch by batch it would hold up
        the host in each step."""
        return order.to(self.images.device)

    def cut(self, indices: Tensor, augment: bool) -> tuple[Tensor, Tensor]:
        """The images (float32, normalised) and labels of these indices (int64 [n])."""
        ((images, labels),) = self.picked(indices, [range(len(indices))])
        return self.prepared(images, augment), labels

    def picked(self, order: Tensor, parts: Sequence[range], seed: tuple[int, ...] | None = None) -> Walk:
        """The images (uint8) and labels of each part of an order (int64 [N]), one part after the other, on
        the device.

        Args:
            parts: consecutive positions in the order; may be empty.
            seed: only for images in files, which are augmented on the host: what their random numbers depend
                on, besides the position. None: they are not augmented.
        """
        order = self.placed(order)  # now, not when the first batch is asked for: not in a step

        def each() -> Walk:
            for part in parts:
                indices = order[part.start : part.stop]
                yield self._on_device(self.images[indices]), self._on_device(self.labels[indices])

        return each()

    def prepared(self, images: Tensor, augment: bool) -> Tensor:
        """Images that were picked, normalised (float32), and augmented first if they are to be.

        All of it is computed on the device, so that it can be captured.
        """
        if augment:
            images = self._crop_and_flip(images)
        images = (images.float() - self.mean) / self.std
        if augment and self.cutout_length:
            images = images * self._cutout_mask(images)
        return images

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


# Of ImageNet's training images, as torchvision's networks take them, in pixel values
IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def statistics_of(dataset: Dataset) -> tuple[Tensor, Tensor]:
    """`channel_statistics` of the training images; ImageNet's where they are files, not all of which are read
    for it."""
    if isinstance(dataset.images, Tensor):
        return channel_statistics(dataset.images)
    return torch.tensor(IMAGENET_MEAN, dtype=torch.float64), torch.tensor(IMAGENET_STD, dtype=torch.float64)


def seeded(device: torch.device | str, *seed: int) -> torch.Generator:
    """A generator whose stream depends on nothing but the numbers in `seed` (and the kind of device)."""
    return reseeded(torch.Generator(device), *seed)


def reseeded(generator: torch.Generator, *seed: int) -> torch.Generator:
    """The generator, from here on as a new one of these numbers."""
    return generator.manual_seed(_from(seed))


def _from(numbers: tuple[int, ...]) -> int:
    """A seed of 63 bits."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


# Bytes of a generator's state, by kind of device: only its own kind takes it up.
STATE_BYTES = {"cpu": 5056, "cuda": 16}


def restored(generator: torch.Generator, state: Tensor, *seed: int) -> bool:
    """Sets the generator to a saved state (uint8 [bytes], on the host). A state of the other kind of device
    says nothing here: the generator is seeded by the numbers in `seed` instead, and False is returned.

    Raises:
        AttributeError, RuntimeError, TypeError: it is no state of a generator.
    """
    own, others = STATE_BYTES[generator.device.type], STATE_BYTES.values()
    if state.dtype == torch.uint8 and state.numel() != own and state.numel() in others:
        reseeded(generator, *seed)
        return False
    generator.set_state(state)
    return True


def permutation(size: int, *seed: int) -> Tensor:
    """A random order of range(size), int64, that depends on nothing but the numbers in `seed`."""
    return torch.randperm(size, generator=seeded("cpu", *seed))


def fingerprint(dataset: Dataset) -> int:
    """A checksum of all images and labels: is a run resumed on the data it began with? Of images in files it
    is that of their names, so that a damaged one can be replaced."""
    checksum = 0
    for content in (dataset.images, dataset.labels, dataset.test_images, dataset.test_labels):
        array = content.contiguous().numpy() if isinstance(content, Tensor) else content.names
        checksum = zlib.crc32(array.tobytes() if array.dtype.kind == "S" else array.data, checksum)
    return checksum
