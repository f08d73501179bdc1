"""Images that stay in their files: worker processes decode and augment batches while the device computes."""

import ctypes
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from darts_fast.data import Batches, ImageFiles, Walk, reseeded
from darts_fast.datasets import only_bombs_warned_of, opened
from darts_fast.distributed import Ranks
from darts_fast.errors import DamagedImage, InputError


class Stream(Batches):
    """Batches as `Batches` gives them, of image files. Augmented images are cropped at random (an area of 8 %
    to all of the image, resized), flipped, and changed in colour on the host; others are resized so that the
    shorter side is 8/7 of `image_size` and cropped at the centre (arXiv 1409.4842, and torchvision's
    training of ImageNet). Cutout is on the device, as ever.

    Args:
        files, labels: N image files, and int64 [N].
        device, statistics, generator, cutout_length: as of `Batches`.
        color_jitter: brightness, contrast and saturation are changed by a factor of up to 1 +- so much, the
            hue by up to half of it.
        workers: processes that decode; 0: this one.
        ranks: of which each decodes its own part of a batch. They find out together that a file is damaged.
    """

    def __init__(
        self,
        files: ImageFiles,
        labels: Tensor,
        device: torch.device,
        statistics: tuple[Tensor, Tensor],
        generator: torch.Generator,
        cutout_length: int = 0,
        color_jitter: float = 0.0,
        workers: int = 0,
        ranks: Ranks | None = None,
    ):
        empty = torch.empty(0)  # no image is in memory
        super().__init__(empty, empty, device, statistics, generator, cutout_length=cutout_length)
        self.files, self.file_labels, self.workers, self.ranks = files, labels, workers, ranks or Ranks()
        self.transforms = _transforms(files.image_size, color_jitter)

    def picked(self, order: Tensor, parts: Sequence[range], seed: tuple[int, ...] | None = None) -> Walk:
        """As `Batches.picked`. The workers begin with the first batch that is asked for, are up to two
        batches each ahead of it, and end with the iterator.

        Raises:
            DamagedImage: a file of the next part cannot be read as an image.
        """
        decoded = _Decoded(self.files, self.file_labels, order, seed, self.transforms)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than processors
            batches: Iterator[Any] = iter(
                DataLoader(
                    decoded,
                    batch_size=None,  # an item is a batch
                    sampler=parts,
                    num_workers=self.workers,
                    pin_memory=self.device.type == "cuda",
                    worker_init_fn=_end_with_the_program_alone,
                    generator=torch.Generator(),  # the caller's is left as it was
                )
            )
        try:
            for _ in parts:
                started = time.perf_counter()
                found = next(batches)
                self.waited += time.perf_counter() - started
                try:
                    with self.ranks.together():
                        if isinstance(found, str):
                            raise DamagedImage(found)
                except InputError as error:
                    raise DamagedImage(str(error)) from error
                images, labels = found
                yield self._on_device(images), self._on_device(labels)
        finally:
            del batches  # which ends the workers now; an exception's traceback would keep it

    def _crop_and_flip(self, images: Tensor) -> Tensor:
        """The workers have done it."""
        return images


class _Decoded(TorchDataset):
    """The images and labels of any part of an order, decoded where `__getitem__` is called.

    The random numbers of an image depend on `seed` and its position in the order alone: the worker, the
    rank and the batch that it is in make no difference.
    """

    def __init__(
        self,
        files: ImageFiles,
        labels: Tensor,
        order: Tensor,
        seed: tuple[int, ...] | None,
        transforms: tuple[Any, Any],
    ):
        self.files, self.labels, self.order, self.seed = files, labels, order, seed
        self.augmented, self.plain = transforms

    def __getitem__(self, part: range) -> tuple[Tensor, Tensor] | str:
        """uint8 [n, 3, image_size, image_size] and int64 [n], or the sentence of a `DamagedImage`. (Raised in
        a worker, it would come with the worker's traceback in it.)"""
        indices = self.order[part.start : part.stop]
        images = torch.empty(len(part), *self.files.shape[1:], dtype=self.files.dtype)
        # The transforms draw from PyTorch's own generator, which is the caller's where there are no workers.
        with only_bombs_warned_of(), torch.random.fork_rng(devices=[]):
            for image, index, position in zip(images, indices.tolist(), part, strict=True):
                try:
                    found = opened(self.files.path(index))
                except DamagedImage as error:
                    return str(error)
                if self.seed is None:
                    image.copy_(self.plain(found))
                else:
                    # From 1: the order itself was drawn with the seed alone, which 0 leaves as it is.
                    reseeded(torch.default_generator, *self.seed, 1 + position)
                    image.copy_(self.augmented(found))
        return images, self.labels[indices]


def _transforms(size: int, color_jitter: float) -> tuple[Any, Any]:
    """Of Pillow's images: augmented ones, and those which are not -> uint8 [3, size, size]. They are computed
    by Pillow, which gives the same bits in every process, whatever its number of threads."""
    from torchvision.transforms import v2

    jitter = [v2.ColorJitter(*[color_jitter] * 3, hue=color_jitter / 2)] if color_jitter else []
    augmented = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), *jitter, v2.PILToTensor()]
    plain = [v2.Resize(round(size * 8 / 7)), v2.CenterCrop(size), v2.PILToTensor()]
    return v2.Compose(augmented), v2.Compose(plain)


def _end_with_the_program_alone(worker: int) -> None:
    """Into a process group of its own: Ctrl-C in a terminal, or `timeout`, signals the whole group of the
    program, which has to finish its step. On Linux the worker ends as soon as the program is killed (else
    some seconds later): it has inherited the lock of the run folder."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
