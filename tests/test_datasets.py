"""Every data set, read from a small file made in its own format; what is wrong with it is named."""

import gzip
import hashlib
import io
import os
import pickle
import struct
import sys
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torchvision import datasets as published

from darts_fast import InputError, SearchConfig
from darts_fast.config import argument_parser
from darts_fast.datasets import READERS, load


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Every download fails at once, and says so."""

    def fail(*args, **kwargs):
        raise URLError("no network\nhere")

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", fail)
    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", fail)


def refusal(*arguments, **keywords):
    """The sentence with which `load` refuses."""
    with pytest.raises(InputError) as refused:
        load(*arguments, **keywords)
    sentence = str(refused.value)
    assert sentence.isprintable() and "Traceback" not in sentence
    return sentence


def md5(file):
    return hashlib.md5(file.read_bytes()).hexdigest()


def check(dataset, name, train, test, classes, crop_padding, flip):
    """`train` and `test` are the images [N, channels, H, W] and labels that were written."""
    assert (dataset.name, dataset.classes) == (name, classes)
    assert (dataset.crop_padding, dataset.flip) == (crop_padding, flip)
    for tensor, expected in (
        (dataset.images, train[0]),
        (dataset.labels, train[1]),
        (dataset.test_images, test[0]),
        (dataset.test_labels, test[1]),
    ):
        assert np.array_equal(tensor.numpy(), expected) and tensor.is_contiguous()
        assert tensor.dtype == (torch.uint8 if expected.ndim == 4 else torch.int64)


def test_digits_are_the_same_split_every_time():
    one, two = load("digits", "nowhere"), load("DIGITS", "nowhere")
    assert one.images.shape == (1437, 1, 8, 8) and one.test_images.shape == (360, 1, 8, 8)
    assert torch.equal(one.images, two.images) and torch.equal(one.test_labels, two.test_labels)
    assert one.images.max() == 255 and len(one.test_labels.unique()) == 10
    seen = {image.numpy().tobytes() for image in one.images}
    assert sum(image.numpy().tobytes() in seen for image in one.test_images) == 0


def test_unknown_names():
    names = "digits, cifar10, cifar100, mnist, fashionmnist, svhn, folder"
    assert refusal("imagenet", "") == f"there is no data set 'imagenet'; there are {names}"
    assert "'Fashion-MNIST' (did you mean fashionmnist?); there are digits" in refusal("Fashion-MNIST", "")
    assert "'cifar-100' (did you mean cifar100?)" in refusal("cifar-100", "")


def test_the_help_names_every_data_set():
    text = " ".join(argument_parser(SearchConfig, "").format_help().split())
    about = text.split(" --dataset DATASET ")[1].split(" --")[0]
    assert all(name in about.replace(",", "").split() for name in READERS) and "folder:" in about


# CIFAR


def write_cifar(name, folder, monkeypatch, count=4):
    """Pickles of random images and labels, with their MD5 sums in torchvision's list; what was written."""
    reader = getattr(published, name.upper())
    base = folder / reader.base_folder
    base.mkdir(parents=True)
    rng = np.random.RandomState(0)
    key, classes = ("labels", 10) if name == "cifar10" else ("fine_labels", 100)
    written = []
    for kind in ("train_list", "test_list"):
        images, labels, sums = [], [], []
        for file, _ in getattr(reader, kind):
            batch = {"data": rng.randint(0, 256, (count, 3072), np.uint8)}
            batch |= {"coarse_labels": [0] * count, key: rng.randint(0, classes, count).tolist()}
            (base / file).write_bytes(pickle.dumps(batch, protocol=2))
            sums.append([file, md5(base / file)])
            images.append(batch["data"].reshape(count, 3, 32, 32))
            labels += batch[key]
        monkeypatch.setattr(reader, kind, sums)
        written.append((np.concatenate(images), np.array(labels)))
    meta = base / reader.meta["filename"]
    meta.write_bytes(pickle.dumps({reader.meta["key"]: list(map(str, range(classes)))}, protocol=2))
    monkeypatch.setattr(reader, "meta", {**reader.meta, "md5": md5(meta)})
    return base, written


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_cifar(name, classes, tmp_path, monkeypatch):
    _, written = write_cifar(name, tmp_path, monkeypatch)
    check(load(name.title(), tmp_path), name, *written, classes, 4, True)


@pytest.mark.parametrize(("name", "file"), [("cifar10", "data_batch_3"), ("cifar100", "train")])
def test_a_truncated_pickle_is_named_and_not_opened(name, file, tmp_path, monkeypatch):
    base, _ = write_cifar(name, tmp_path, monkeypatch)
    victim = base / file
    victim.write_bytes(victim.read_bytes()[:-7])
    monkeypatch.setattr("pickle.load", lambda *_, **__: pytest.fail("unpickled"))
    assert f"{name}: {victim} is damaged (its MD5" in refusal(name, tmp_path)
    victim.unlink()
    victim.mkdir()
    assert f"{victim} is damaged" in refusal(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("cifar10", [f"cifar-10-batches-py/{f}" for f in ("data_batch_1", "test_batch", "batches.meta")]),
        ("cifar100", [f"cifar-100-python/{f}" for f in ("train", "test", "meta")]),
        ("mnist", [f"MNIST/raw/{f}.gz" for f in ("train-images-idx3-ubyte", "t10k-labels-idx1-ubyte")]),
        ("fashionmnist", ["FashionMNIST/raw/t10k-images-idx3-ubyte.gz"]),
        ("svhn", ["train_32x32.mat", "test_32x32.mat"]),
    ],
)
def test_absent_files_without_a_network_are_named(name, files, tmp_path):
    sentence = refusal(name, tmp_path / "data")
    assert all(str(tmp_path / "data" / file) in sentence for file in files)
    assert "could not be read or downloaded (" in sentence and "no network here" in sentence


def test_one_absent_file_is_named_alone(tmp_path, monkeypatch):
    base, _ = write_cifar("cifar10", tmp_path, monkeypatch)
    (base / "data_batch_2").unlink()
    sentence = refusal("cifar10", tmp_path)
    assert str(base / "data_batch_2") in sentence and "data_batch_1" not in sentence


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "data").write_text("")
    assert str(tmp_path / "data") in refusal("svhn", tmp_path / "data")


@pytest.mark.parametrize("name", ["cifar100", "mnist", "svhn", "folder"])
def test_a_path_that_is_too_long(name):
    assert "File name too long" in refusal(name, "d" * 300)


def test_a_download_that_brings_something_else(tmp_path, monkeypatch):
    monkeypatch.setattr(published.CIFAR10, "__init__", lambda *_, **__: None)
    assert "(the download brought other files)" in refusal("cifar10", tmp_path)


# MNIST and its kin


def write_idx(file, array):
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    content = header + array.tobytes()
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)


def write_mnist(reader_name, folder, monkeypatch, suffix=".gz", counts=(6, 3)):
    reader = getattr(published, reader_name)
    raw = folder / reader_name / "raw"
    raw.mkdir(parents=True)
    rng = np.random.RandomState(0)
    written, sums = [], []
    for (images_file, _), (labels_file, _), count in zip(
        reader.resources[::2], reader.resources[1::2], counts, strict=True
    ):
        images = rng.randint(0, 256, (count, 28, 28), np.uint8)
        labels = rng.randint(0, 10, count, np.uint8)
        for file, array in ((images_file, images), (labels_file, labels)):
            write_idx((raw / file).with_suffix(suffix), array)
            sums.append((file, md5((raw / file).with_suffix(suffix))))
        written.append((images[:, None], labels.astype(np.int64)))
    monkeypatch.setattr(reader, "resources", sums)
    return raw, written


@pytest.mark.parametrize("suffix", [".gz", ""])
@pytest.mark.parametrize(("reader_name", "flip"), [("MNIST", False), ("FashionMNIST", True)])
def test_mnist(reader_name, flip, suffix, tmp_path, monkeypatch):
    _, written = write_mnist(reader_name, tmp_path, monkeypatch, suffix)
    check(load(reader_name, tmp_path), reader_name.lower(), *written, 10, 4, flip)


def test_mnist_is_not_read_from_a_cache_of_old_versions(tmp_path, monkeypatch):
    _, written = write_mnist("MNIST", tmp_path, monkeypatch)
    (tmp_path / "MNIST" / "processed").mkdir()
    for name in ("training.pt", "test.pt"):
        torch.save(
            (torch.zeros(1, 28, 28).byte(), torch.zeros(1).long()), tmp_path / "MNIST/processed" / name
        )
    check(load("mnist", tmp_path), "mnist", *written, 10, 4, False)


def test_a_truncated_gz_is_named(tmp_path, monkeypatch):
    raw, _ = write_mnist("MNIST", tmp_path, monkeypatch)
    victim = raw / "t10k-images-idx3-ubyte.gz"
    victim.write_bytes(victim.read_bytes()[:-7])
    assert f"mnist: {victim} is damaged (its MD5" in refusal("mnist", tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content + b"0",
        lambda content: content[:10],
        lambda content: b"",
        lambda content: b"\0\0\x0d\3" + content[4:],  # of floats
        lambda content: b"\0\0\x08\1" + content[4:],
        lambda content: b"\x89PNG" + content[4:],
        lambda content: content[:4] + b"\xff" * 12 + content[16:],  # of 79 octillion pixels
    ],
)
def test_damaged_extracted_files_are_named(damage, tmp_path, monkeypatch):
    raw, _ = write_mnist("FashionMNIST", tmp_path, monkeypatch, suffix="")
    victim = raw / "train-images-idx3-ubyte"
    victim.write_bytes(damage(victim.read_bytes()))
    assert f"{victim} is damaged (it is no IDX file" in refusal("fashionmnist", tmp_path)


def test_a_file_without_end_is_not_read_whole(tmp_path, monkeypatch):
    raw, _ = write_mnist("FashionMNIST", tmp_path, monkeypatch, suffix="")
    victim = raw / "train-images-idx3-ubyte"
    os.truncate(victim, 2**40)  # it takes no space
    assert f"{victim} is damaged (it is no IDX file" in refusal("fashionmnist", tmp_path)


@pytest.mark.parametrize(
    ("file", "array"),
    [
        ("train-labels-idx1-ubyte", np.zeros(5, np.uint8)),  # of 6 images
        ("train-labels-idx1-ubyte", np.full(6, 10, np.uint8)),
        ("t10k-images-idx3-ubyte", np.zeros((4, 28, 28), np.uint8)),  # of 3 labels
        ("t10k-images-idx3-ubyte", np.zeros((3, 28, 24), np.uint8)),
    ],
)
def test_files_that_do_not_belong_together(file, array, tmp_path, monkeypatch):
    raw, _ = write_mnist("MNIST", tmp_path, monkeypatch, suffix="")
    write_idx(raw / file, array)
    assert f"mnist: the files in {raw} do not belong together" in refusal("mnist", tmp_path)


# SVHN


def write_svhn(folder, monkeypatch, counts=(5, 3)):
    rng = np.random.RandomState(0)
    written, sums = [], {}
    for split, count in zip(("train", "test"), counts, strict=True):
        url, file, _ = published.SVHN.split_list[split]
        images = rng.randint(0, 256, (count, 3, 32, 32), np.uint8)
        labels = np.arange(1, count + 1, dtype=np.uint8) * 2  # 10 is the digit 0 there
        savemat(folder / file, {"X": images.transpose(2, 3, 1, 0), "y": labels[:, None]}, do_compression=True)
        sums[split] = [url, file, md5(folder / file)]
        written.append((images, labels.astype(np.int64) % 10))
    monkeypatch.setattr(published.SVHN, "split_list", sums)
    return written


def test_svhn(tmp_path, monkeypatch):
    written = write_svhn(tmp_path, monkeypatch)
    assert written[0][1].tolist() == [2, 4, 6, 8, 0]
    check(load("SVHN", tmp_path), "svhn", *written, 10, 4, False)


def test_a_truncated_mat_file_is_named(tmp_path, monkeypatch):
    write_svhn(tmp_path, monkeypatch)
    victim = tmp_path / "test_32x32.mat"
    victim.write_bytes(victim.read_bytes()[:-7])
    assert f"svhn: {victim} is damaged (its MD5" in refusal("svhn", tmp_path)


# A folder of images


def picture(seed, height=32, width=32, channels=3):
    return np.random.RandomState(seed).randint(0, 256, (height, width, channels), np.uint8).squeeze()


def save(file, pixels, **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(file, **options)


def only_image(tmp_path, image_size=32):
    """The one image of the one class in `tmp_path`, [H, W, 3]."""
    return load("folder", tmp_path, image_size).images[0].permute(1, 2, 0).numpy()


def test_folder_with_a_test_split(tmp_path):
    written = {"train": ([], []), "test": ([], [])}
    for split, names in {"train": ["b.png", "a.bmp", "C.webp"], "test": ["z.ppm", "y.tiff"]}.items():
        for label, name in enumerate(["Zebra", "ant", "my dog"]):  # in the order of their letters' codes
            for number, file in enumerate(sorted(names)):
                pixels = picture(100 * label + 10 * number + len(names))
                save(tmp_path / split / name / file, pixels, **({"lossless": True} if "webp" in file else {}))
                written[split][0].append(pixels.transpose(2, 0, 1))
                written[split][1].append(label)
    for hidden in (".DS_Store", "train/.cache", "train/ant/.hidden.png", "train/notes.txt"):
        (tmp_path / hidden).write_text("no image")  # hidden, or beside the classes
    (tmp_path / "train" / ".thumbnails").mkdir()
    dataset = load("Folder", tmp_path)
    expected = [tuple(map(np.array, written[split])) for split in ("train", "test")]
    check(dataset, "folder", *expected, 3, 4, True)


def test_folder_without_a_test_split_keeps_a_fifth_of_each_class(tmp_path):
    for label, (name, count) in enumerate({"a": 10, "b": 5, "c": 3}.items()):
        for number in range(count):
            save(tmp_path / name / f"{number}.png", np.full((8, 8), 20 * number + label, np.uint8))
    dataset, again = load("folder", tmp_path, 8), load("folder", tmp_path, 8)
    assert torch.equal(dataset.images, again.images) and torch.equal(dataset.test_images, again.test_images)
    assert dataset.labels.bincount().tolist() == [8, 4, 3] and dataset.test_labels.tolist() == [0, 0, 1]
    for images, labels in ((dataset.images, dataset.labels), (dataset.test_images, dataset.test_labels)):
        assert torch.equal(images[:, 0, 0, 0].long() % 20, labels)
        assert torch.equal(images, images[:, :1, :1, :1].expand(-1, 3, 8, 8))
    values = torch.cat([dataset.images, dataset.test_images])[:, 0, 0, 0]
    assert len(values.unique()) == 18
    assert dataset.crop_padding == 1


def test_images_are_resized_by_the_shorter_side_and_cropped_at_the_centre(tmp_path):
    small = picture(0, 8, 8)
    wide = np.zeros((32, 64, 3), np.uint8)
    wide[:, 16:48] = small.repeat(4, 0).repeat(4, 1)
    save(tmp_path / "a" / "wide.png", wide)
    save(tmp_path / "b" / "tall.png", wide.transpose(1, 0, 2))
    images = load("folder", tmp_path, 32).images
    assert np.array_equal(images[0].permute(1, 2, 0), wide[:, 16:48])
    assert np.array_equal(images[1].permute(2, 1, 0), wide[:, 16:48])
    # Smaller by 4: each new pixel weighs the old ones around it in a triangle; here in float64.
    position = (np.arange(64) + 0.5)[None] - (np.arange(16) * 4 + 2)[:, None]
    weights = np.clip(1 - np.abs(position) / 4, 0, None)
    across = weights / weights.sum(1, keepdims=True)
    down = weights[:8, :32] / weights[:8, :32].sum(1, keepdims=True)
    expected = np.einsum("yi,ijc,xj->yxc", down, wide, across)[:, 4:12]
    found = load("folder", tmp_path, 8).images[0].permute(1, 2, 0).numpy()
    assert np.abs(found - expected).max() <= 1


GREY, COLOUR = picture(1, channels=1), picture(2)
SIXTEEN = GREY.astype(np.uint16) * 256 + 77
THREE = GREY[:, :, None].repeat(3, 2)


def palette():
    image = Image.fromarray(COLOUR).quantize(16)
    return image, np.asarray(image.convert("RGB"))


@pytest.mark.parametrize(
    ("file", "written", "expected"),
    [
        ("grey.png", GREY, THREE),
        ("black and white.png", GREY > 127, (THREE > 127) * np.uint8(255)),
        ("grey with alpha.png", Image.merge("LA", [Image.fromarray(GREY)] * 2), THREE),
        ("rgba.png", Image.merge("RGBA", [*Image.fromarray(COLOUR).split(), Image.fromarray(GREY)]), COLOUR),
        ("palette.png", *palette()),
        ("palette.gif", *palette()),
        ("16 bits.png", SIXTEEN, THREE),
        ("16 bits.tiff", SIXTEEN, THREE),
        ("32 bits that use 16.tiff", SIXTEEN.astype(np.int32), THREE),
        ("cmyk.tiff", Image.fromarray(COLOUR).convert("CMYK"), COLOUR),
        ("no suffix at all", COLOUR, COLOUR),
    ],
)
def test_every_kind_of_image_becomes_rgb(file, written, expected, tmp_path):
    save(tmp_path / "a" / file, written, **({} if "." in file else {"format": "PNG"}))
    assert np.array_equal(only_image(tmp_path), expected)


def test_jpeg_is_turned_as_its_exif_says(tmp_path):
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:16, :16] = [250, 10, 10]  # red at the top left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: to the top right
    save(tmp_path / "a" / "1.jpg", pixels, exif=exif, quality=95, subsampling=0)
    found = only_image(tmp_path).astype(int)
    assert np.abs(found - np.rot90(pixels, -1).astype(int)).max() < 60
    assert np.abs(found[4:12, 20:28] - [250, 10, 10]).max() < 5


def test_a_cmyk_jpeg(tmp_path):
    save(tmp_path / "a" / "1.jpg", Image.new("CMYK", (32, 32), (0, 255, 255, 0)), quality=95)
    assert np.abs(only_image(tmp_path).astype(int) - [255, 0, 0]).max() < 5


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    save(tmp_path / "a" / "1.gif", frames[0], save_all=True, append_images=frames[1:])
    assert (only_image(tmp_path) == [255, 0, 0]).all()


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "gif", "tiff", "webp", "ppm"])
def test_a_truncated_image_is_named(suffix, tmp_path):
    file = tmp_path / "cats" / f"7.{suffix}"
    save(file, picture(0))
    content = file.read_bytes()
    for length in (0, 10, len(content) // 2, len(content) * 9 // 10):
        file.write_bytes(content[:length])
        assert refusal("folder", tmp_path).startswith(f"{file} could not be read as an image ("), length


def test_a_damaged_png_is_named(tmp_path):
    file = tmp_path / "cats" / "7.png"
    save(file, picture(0))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert f"{file} could not be read as an image" in refusal("folder", tmp_path)


def test_what_is_no_image_is_named(tmp_path):
    save(tmp_path / "cats" / "1.png", picture(0))
    for name, content in {
        "Thumbs.db": b"\xd0\xcf",
        "x.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n",
        "l.csv": b"a,b",
    }.items():
        file = tmp_path / "cats" / name
        file.write_bytes(content)
        sentence = refusal("folder", tmp_path)
        assert f"{file} could not be read as an image (it is none of BMP, GIF, JPEG, PNG" in sentence
        file.unlink()
    save(tmp_path / "cats" / "float.tiff", picture(0, channels=1).astype(np.float32))
    assert "float.tiff could not be read as an image (its pixels are neither" in refusal("folder", tmp_path)


@pytest.mark.parametrize("limit", [3000, 1000])
def test_a_decompression_bomb_is_refused(limit, tmp_path, monkeypatch, recwarn):
    """Pillow warns above its limit, and raises above twice that."""
    save(tmp_path / "a" / "1.png", picture(0, 64, 64))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    assert f"1.png could not be read as an image (it has more than {limit} pixels)" in refusal(
        "folder", tmp_path
    )
    assert not recwarn.list


def test_folders_that_are_no_data_set(tmp_path):
    assert f"{tmp_path / 'x'} could not be read ([Errno 2]" in refusal("folder", tmp_path / "x")
    assert f"{tmp_path} holds no folders of images; images belong in" in refusal("folder", tmp_path)
    save(tmp_path / "a" / "1.png", picture(0))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / ".hidden").write_text("")
    assert f"{tmp_path / 'b'} holds no images; images belong in" in refusal("folder", tmp_path)
    assert "1.png could not be read" in refusal("folder", tmp_path / "a" / "1.png")


def test_train_and_test_must_hold_the_same_classes(tmp_path):
    for file in ("train/a/1.png", "train/b/1.png", "test/b/1.png", "test/c/1.png"):
        save(tmp_path / file, picture(0))
    assert "train and test must hold the same classes, and only one of them holds a, c" in refusal(
        "folder", tmp_path
    )


def test_a_layout_without_test_is_explained(tmp_path):
    save(tmp_path / "train" / "a" / "1.png", picture(0))
    save(tmp_path / "validation" / "a" / "1.png", picture(0))
    assert f"{tmp_path / 'train' / 'a'} is not a file; images belong in train/CLASS/" in refusal(
        "folder", tmp_path
    )


# Windows has no os.mkfifo, and makes symbolic links for administrators only.
@pytest.mark.skipif(sys.platform == "win32", reason="makes named pipes and symbolic links, as POSIX has them")
def test_links_and_pipes_do_not_hang(tmp_path):
    save(tmp_path / "elsewhere" / "1.png", picture(0))
    (tmp_path / "data" / "a").mkdir(parents=True)
    (tmp_path / "data" / "a" / "1.png").symlink_to(tmp_path / "elsewhere" / "1.png")
    (tmp_path / "data" / "b").symlink_to(tmp_path / "elsewhere")
    assert load("folder", tmp_path / "data").labels.tolist() == [0, 1]
    odd = tmp_path / "data" / "a" / "2.png"
    for make, sentence in (
        (lambda: odd.symlink_to(tmp_path / "data"), "2.png is not a file"),  # round and round
        (lambda: odd.symlink_to(tmp_path / "nowhere"), "2.png is not a file"),
        (lambda: odd.symlink_to(odd), "2.png"),
        (lambda: os.mkfifo(odd), "2.png is not a file"),
    ):
        make()
        assert sentence in refusal("folder", tmp_path / "data")
        odd.unlink()
    os.mkdir(tmp_path / "data" / "a" / "line\nbreak")
    assert r"line\nbreak' is not a file" in refusal("folder", tmp_path / "data")


def test_images_that_do_not_fit_in_memory(tmp_path, monkeypatch):
    for split in ("train", "test"):
        save(tmp_path / split / "a" / "1.png", picture(0))

    def full(*_, **__):
        raise MemoryError

    monkeypatch.setattr("numpy.empty", full)
    assert "1 images of 64 x 64 do not fit in memory; choose a smaller --image_size" in refusal(
        "folder", tmp_path, 64
    )


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_shown_on_a_terminal_only(terminal, tmp_path, monkeypatch, capsys):
    save(tmp_path / "a" / "1.png", picture(0))
    stderr = io.StringIO()
    stderr.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stderr)
    load("folder", tmp_path)
    assert ("reading images" in stderr.getvalue()) == terminal
    assert terminal or not stderr.getvalue()
    assert capsys.readouterr().out == ""


def test_image_size_is_only_for_folder():
    with pytest.raises(InputError, match="image_size is for the data set folder only; images of digits"):
        SearchConfig(image_size=32)
    with pytest.raises(InputError, match="image_size must be divisible by 4, from 8 to 1024, not 30"):
        SearchConfig(dataset="folder", image_size=30)
    assert SearchConfig(dataset="FOLDER", device="cpu").resolved("folder").image_size == 32
    assert SearchConfig(dataset="folder", image_size=64, device="cpu").resolved("folder").image_size == 64
    assert SearchConfig(device="cpu").resolved("digits").image_size is None
