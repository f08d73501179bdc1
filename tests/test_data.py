"""Data sets in memory, and the augmentation of their batches."""

import pytest
import torch

from darts_fast import InputError
from darts_fast.data import (
    Batches,
    channel_statistics,
    check_for_network,
    from_tensors,
    permutation,
    restored,
    seeded,
)
from darts_fast.datasets import load

CPU = torch.device("cpu")
PLAIN = (torch.zeros(1), torch.ones(1))  # statistics that leave pixel values as they are


@pytest.mark.parametrize(
    ("images", "labels", "sentence"),
    [
        (torch.zeros(8, 3, 8, 8), torch.zeros(8).long(), "uint8"),
        (torch.zeros(8, 8, 8).byte(), torch.zeros(8).long(), "uint8"),
        (torch.zeros(8, 3, 8, 8).byte(), torch.zeros(7).long(), "one label an image"),
        (torch.zeros(8, 3, 8, 8).byte(), torch.zeros(8), "integer"),
        (torch.zeros(8, 3, 8, 8).byte(), torch.full((8,), -1), "0 or more"),
        (torch.zeros(8, 0, 8, 8).byte(), torch.arange(8), "a channel at least"),
        (torch.zeros(8, 3, 10, 8).byte(), torch.arange(8), "10 x 8; both sides must be divisible by 4"),
        (torch.zeros(8, 3, 4, 4).byte(), torch.arange(8), "at least 8"),
        (torch.zeros(8, 3, 8, 8).byte(), torch.zeros(8).long(), "2 classes"),
        (torch.zeros(0, 3, 8, 8).byte(), torch.zeros(0).long(), "4 images"),
    ],
)
def test_tensors_that_do_not_fit(images, labels, sentence):
    with pytest.raises(InputError, match=sentence):
        check_for_network(from_tensors(images, labels))


IMAGES, LABELS = torch.zeros(8, 3, 8, 8).byte(), torch.arange(8)


def test_a_user_s_own_test_split():
    test_images = torch.randint(0, 256, (5, 8, 8, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    dataset = from_tensors(IMAGES, LABELS, test_images, torch.tensor([7, 0, 0, 0, 1], dtype=torch.int16))
    assert torch.equal(dataset.test_images, test_images) and dataset.test_images.is_contiguous()
    assert dataset.test_labels.tolist() == [7, 0, 0, 0, 1] and dataset.test_labels.dtype == torch.int64
    assert dataset.classes == 8
    assert from_tensors(IMAGES, LABELS).test_images.shape == (0, 3, 8, 8)


@pytest.mark.parametrize(
    ("images", "labels", "sentence"),
    [
        (IMAGES, None, "given together"),
        (None, LABELS, "given together"),
        (IMAGES.float(), LABELS, "test images must be a uint8"),
        (IMAGES, LABELS.float(), "test labels must be an integer"),
        (IMAGES, LABELS[1:], r"test labels must be one label an image, 8 in one row, not \(7,\)"),
        (IMAGES, LABELS - 1, "test labels must be 0 or more"),
        (IMAGES, LABELS + 1, "test labels must be below 8"),
        (IMAGES[:, :1], LABELS, "test images are 1 x 8 x 8 and its images 3 x 8 x 8"),
        (IMAGES[..., :4], LABELS, "test images are 3 x 8 x 4 and"),
    ],
)
def test_a_test_split_that_does_not_fit(images, labels, sentence):
    with pytest.raises(InputError, match=sentence):
        from_tensors(IMAGES, LABELS, images, labels)


def test_a_stem_that_shrinks_more_needs_sides_that_divide():
    dataset = from_tensors(torch.zeros(8, 3, 96, 68).byte(), LABELS)
    check_for_network(dataset)
    with pytest.raises(InputError, match="96 x 68.*divisible by 32 and at least 64.* halves them 5 times"):
        check_for_network(dataset, multiple=32)
    check_for_network(from_tensors(torch.zeros(8, 3, 96, 64).byte(), LABELS), multiple=32)


def test_statistics_are_exact():
    images = torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8)
    images[:, 2] = 7
    mean, std = channel_statistics(images)
    expected = images.double().transpose(0, 1).flatten(1)
    assert torch.allclose(mean, expected.mean(1), rtol=1e-12)
    assert torch.allclose(std[:2], expected.std(1, unbiased=False)[:2], rtol=1e-12)
    assert std[2] == 1  # a constant channel is not divided by zero


def test_every_augmented_image_is_a_shifted_perhaps_mirrored_original():
    images = torch.randint(1, 256, (600, 1, 8, 12), dtype=torch.uint8)
    labels = torch.arange(600)
    batches = Batches(images, labels, CPU, PLAIN, seeded("cpu", 0), crop_padding=2, flip=True)
    found, found_labels = batches.cut(labels, augment=True)
    assert torch.equal(found_labels, labels) and found.dtype == torch.float32
    kinds = set()
    for original, image in zip(images.float(), found, strict=True):
        padded = torch.nn.functional.pad(original, (2, 2, 2, 2))
        crops = {(y, x): padded[:, y : y + 8, x : x + 12] for y in range(5) for x in range(5)}
        matches = [(place, False) for place, crop in crops.items() if torch.equal(crop, image)]
        matches += [(place, True) for place, crop in crops.items() if torch.equal(crop.flip(-1), image)]
        assert len(matches) == 1
        kinds |= set(matches)
    assert len(kinds) == 50  # each image is one of the 25 shifts, mirrored or not, and all of them occur


def test_tensors_need_not_be_contiguous():
    images = torch.randint(0, 256, (8, 8, 8, 3), dtype=torch.uint8)
    dataset = from_tensors(images.permute(0, 3, 1, 2), torch.arange(16)[::2])
    assert torch.equal(dataset.images, images.permute(0, 3, 1, 2)) and dataset.images.is_contiguous()
    assert dataset.labels.tolist() == list(range(0, 16, 2)) and dataset.labels.is_contiguous()


# On a CPU host and device are one, so that the two residences compared here would be the same path.
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA: a device that is not the host")
def test_images_too_large_for_the_device_give_the_same_batches(monkeypatch):
    images, labels = torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8), torch.arange(64)
    cut = []
    for fit in (True, False):
        monkeypatch.setattr("darts_fast.data.fits", lambda *_, fit=fit: fit)
        statistics, generator = channel_statistics(images), seeded("cuda", 0)
        batches = Batches(images, labels, torch.device("cuda"), statistics, generator, 1, True, 2)
        assert batches.images.is_cuda == fit
        cut.append(batches.cut(batches.placed(torch.arange(5, 40)), augment=True))
    assert torch.equal(cut[0][0], cut[1][0]) and torch.equal(cut[0][1], cut[1][1])


def test_cutout_blanks_one_square_and_nothing_else():
    images = torch.full((300, 1, 8, 8), 9, dtype=torch.uint8)
    batches = Batches(images, torch.zeros(300).long(), CPU, PLAIN, seeded("cpu", 0), cutout_length=4)
    found, _ = batches.cut(torch.arange(300), augment=True)
    sizes = set()
    for image in found[:, 0]:
        blank = image == 0
        rows, columns = blank.any(1).nonzero().flatten(), blank.any(0).nonzero().flatten()
        assert blank[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        assert (image[~blank] == 9).all()
        sizes.add((len(rows), len(columns)))
    assert sizes == {(h, w) for h in (2, 3, 4) for w in (2, 3, 4)}  # clipped at the border


def test_validation_batches_are_normalised_and_otherwise_untouched():
    dataset = load("digits", "")
    statistics = channel_statistics(dataset.images)
    batches = Batches(dataset.images, dataset.labels, CPU, statistics, seeded("cpu", 0), 2, True, 4)
    found, labels = batches.cut(torch.arange(1437), augment=False)
    assert abs(float(found.mean())) < 1e-4 and abs(float(found.std()) - 1) < 1e-3
    restored = (found * batches.std + batches.mean).round().byte()
    assert torch.equal(restored, dataset.images) and torch.equal(labels, dataset.labels)


def test_orders_depend_on_their_seeds_alone():
    assert torch.equal(permutation(100, 2, 1, 0), permutation(100, 2, 1, 0))
    assert (
        len({tuple(permutation(100, *s).tolist()) for s in [(2, 1, 0), (2, 0, 1), (2, 1, 1), (3, 1, 0)]}) == 4
    )
    assert permutation(100, 5).sort().values.tolist() == list(range(100))


class OnCuda:
    """A generator of a CUDA device, as far as `restored` sees it."""

    device = torch.device("cuda")

    def manual_seed(self, seed):
        self.seed = seed

    def set_state(self, state):
        assert state.numel() == 16
        self.state = state


def test_a_generator_takes_up_what_its_own_kind_of_device_saved_and_is_seeded_elsewhere():
    host, saved = seeded("cpu", 1), seeded("cpu", 2).get_state()
    on_cuda, of_cuda = OnCuda(), torch.arange(16, dtype=torch.uint8)
    assert restored(host, saved, 3, 4) and torch.equal(host.get_state(), saved)
    assert restored(on_cuda, of_cuda, 3, 4) and on_cuda.state is of_cuda
    assert not restored(host, of_cuda, 3, 4)
    assert torch.equal(host.get_state(), seeded("cpu", 3, 4).get_state())
    assert not restored(on_cuda, saved, 3, 4)
    assert on_cuda.seed == seeded("cpu", 3, 4).initial_seed()
    for junk in (torch.zeros(17, dtype=torch.uint8), torch.zeros(16), None):
        with pytest.raises((AttributeError, RuntimeError, TypeError)):
            restored(host, junk, 3, 4)
