"""Data sets from tiny files in their own formats, augmentation, and messages about bad data."""

import os
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image

import common
from conftest import data_options

RNG = np.random.default_rng(0)


def load(dataset, tmp_path, **more):
    common.list_folder.cache_clear()  # as a new process would start
    return common.load_data(data_options(dataset, tmp_path / "cache", **more))


@pytest.fixture
def refused(capsys, tmp_path):
    """Loads what cannot be loaded; returns the one line that says why."""
    def check(dataset, **more):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            load(dataset, tmp_path, **more)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1
        return err
    return check


def draw(path, colour, size=(32, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def is_that_of(path, image):
    return np.array_equal(image.permute(1, 2, 0), np.asarray(Image.open(path)))


# ------------------------------------------------------------------------------------ augmentation
def test_augment_recomputed():
    """An image that holds its own coordinates tells where it was cropped, and if mirrored."""
    torch.manual_seed(0)
    place = torch.arange(1, 33)
    image = torch.stack([place[:, None].expand(32, 32), place.expand(32, 32),
                         torch.full((32, 32), 99)])
    x = common.augment(image.byte().expand(8100, 3, 32, 32), flip=True) * 255
    mirrored = x[:, 1, 16, 16] > x[:, 1, 16, 17]
    assert 3900 < mirrored.sum() < 4200
    rows = x[:, 0, 16, 16].round().long() - 17
    columns = torch.where(mirrored, x[:, 1, 16, 15], x[:, 1, 16, 16]).round().long() - 17
    counts = torch.bincount((rows + 4) * 9 + columns + 4, minlength=81)
    assert len(counts) == 81 and ((counts - 100).abs() < 45).all()  # each place equally often
    padded = F.pad(image, [4] * 4)
    for i in range(20):
        expected = padded[:, rows[i] + 4:rows[i] + 36, columns[i] + 4:columns[i] + 36]
        assert torch.equal(x[i].round().long(), expected.flip(2) if mirrored[i] else expected)
    assert x.is_contiguous(memory_format=common.FORMAT) and x.dtype == torch.float32


def numbered(n):
    """A data set of which ten images are held out. An image holds its number, also its label."""
    x = torch.arange(n).byte().view(n, 1, 1, 1).expand(n, 3, 8, 8)
    return common.Data((x, torch.arange(n), torch.arange(10, n)), None, None, [])


def test_label_noise_gives_a_share_of_the_training_images_any_wrong_label(tmp_path):
    right, wrong = (load("shapes", tmp_path, val_size=200, train_size=1000, label_noise=share)
                    for share in (0, 0.25))
    differ = wrong.train[1] != right.train[1]
    assert differ.sum() == differ[right.train[2]].sum() == 250  # none of those that are left out
    assert len(set(((wrong.train[1] - right.train[1]) % 10)[differ].tolist())) == 9
    assert torch.equal(right.val[1], wrong.val[1]) and torch.equal(right.test[1], wrong.test[1])


def test_batches_are_full_shuffled_and_seeded_and_hold_every_image_once():
    def drawn(size, seed, epoch):
        return list(common.batches(numbered(60), data_options(
            batch_size=size, epochs=9, seed=seed), epoch))
    orders = [torch.cat([y for _, y in drawn(16, *which)]).tolist()
              for which in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert [len(y) for _, y in drawn(16, 0, 0)] == [16, 16, 16] and len(set(orders[0])) == 48
    assert orders[0] == orders[1] and orders[0] not in (orders[2], orders[3], sorted(orders[0]))
    (x, y), = drawn(50, 0, 0)
    assert sorted(y.tolist()) == list(range(10, 60))
    assert torch.equal((x.amax((1, 2, 3)) * 255).round().long(), y)  # they stay together


def test_processes_share_each_batch(monkeypatch):
    args = data_options(batch_size=10, epochs=1)
    whole, parts = [y for _, y in common.batches(numbered(50), args, 0)], []
    monkeypatch.setattr(common, "WORLD", 2)
    for rank in (0, 1):
        monkeypatch.setattr(common, "RANK", rank)
        parts.append([y for _, y in common.batches(numbered(50), args, 0)])
    for y, a, b in zip(whole, *parts, strict=True):
        assert len(a) == len(b) == 5 and sorted(y.tolist()) == sorted(a.tolist() + b.tolist())


# ------------------------------------------------------------------------------------------ shapes
def test_shapes_carry_a_faint_pattern_that_tells_the_class():
    """A matched filter for the pattern reads the class; eps 8/255 is enough to fake any other."""
    x, y = common.draw_shapes(1000, 0)
    assert x.shape == (1000, 3, 32, 32) and x.dtype == torch.uint8
    assert torch.bincount(y).tolist() == [100] * 10
    pattern = torch.from_numpy(np.random.default_rng(12345).choice([-4, 4], (10, 3, 32, 32)))
    texture = x.float() - F.avg_pool2d(x.float(), 3, 1, 1, count_include_pad=False)

    def found(texture):
        return torch.einsum("nchw,kchw->nk", texture.clamp(-12, 12), pattern.float()).argmax(1)
    other = (y + 1) % 10
    assert (found(texture) == y).float().mean() > 0.9
    assert 11 < (texture.clamp(-12, 12) * pattern[y]).mean() < 16  # +-4, but for outlines
    assert (found(texture + pattern[other] - pattern[y]) == other).float().mean() > 0.9


def test_the_parts_of_shapes(tmp_path):
    """No image is in two parts, which depend neither on the seed nor on the size of another one."""
    one, other = (load("shapes", tmp_path, val_size=50, seed=seed) for seed in (0, 1))
    small = load("shapes", tmp_path, val_size=80, train_size=70, test_size=100)
    assert one.classes[:2] == ["disc", "ring"]
    for a, b in zip((*one.train, *one.val, *one.test), (*other.train, *other.val, *other.test)):
        assert torch.equal(a, b)
    images = [{bytes(x.numpy()) for x in part}
              for part in (one.train[0][one.train[2]], one.val[0], one.test[0])]
    assert [len(part) for part in images] == [2150, 50, 1000]
    assert not images[0] & images[1] and not images[0] & images[2] and not images[1] & images[2]
    assert torch.equal(small.train[0], one.train[0]) and torch.equal(small.val[0][:50], one.val[0])
    assert torch.equal(small.train[2], one.train[2][30:100])  # a smaller part of the same
    labels = {bytes(x.numpy()): y for x, y in zip(one.test[0], one.test[1].tolist())}
    assert [labels[bytes(x.numpy())] for x in small.test[0]] == small.test[1].tolist()


# ----------------------------------------------------------------------- torchvision's four formats
@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
def test_cifar(tmp_path, monkeypatch, name):
    """With an MD5 of None torchvision takes a file as it is, and downloads nothing."""
    cls, images = getattr(torchvision.datasets, name), {}
    folder = tmp_path / "cache" / cls.base_folder
    folder.mkdir(parents=True)
    for part in ("train_list", "test_list"):
        x = RNG.integers(0, 256, (len(getattr(cls, part)), 4, 3072), dtype=np.uint8)
        y = RNG.integers(0, 10, (len(x), 4)).tolist()
        for (file, _), a, b in zip(getattr(cls, part), x, y):
            labels = {"labels" if name == "CIFAR10" else "fine_labels": b}
            (folder / file).write_bytes(pickle.dumps(dict(data=a) | labels))
        images[part] = x.reshape(-1, 3, 32, 32), sum(y, [])
        monkeypatch.setattr(cls, part, [[file, None] for file, _ in getattr(cls, part)])
    names = {cls.meta["key"]: [f"class{i}" for i in range(10)]}
    (folder / cls.meta["filename"]).write_bytes(pickle.dumps(names))
    monkeypatch.setattr(cls, "meta", cls.meta | dict(md5=None))
    data = load(name.lower(), tmp_path)
    for part, (x, y, *_) in (("train_list", data.train), ("test_list", data.test)):
        assert x.dtype == torch.uint8 and y.dtype == torch.int64 and x.is_contiguous()
        assert np.array_equal(x, images[part][0]) and y.tolist() == images[part][1]
    assert data.classes == [f"class{i}" for i in range(10)]
    assert load(name.lower(), tmp_path, image_size=48).val[0].shape == (1, 3, 48, 48)


def test_a_failed_download_names_the_file_to_delete(tmp_path, monkeypatch, refused):
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "http://127.0.0.1:9/x.tar.gz")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/cifar-10-python.tar.gz").write_text("an interrupted download")
    message = refused("cifar10")
    assert "cifar-10-python.tar.gz" in message and str(tmp_path / "cache") in message
    assert "delete it" in message and "--dataset shapes" in message


def test_stl10(tmp_path, monkeypatch):
    cls, x = torchvision.datasets.STL10, RNG.integers(0, 256, (6, 3, 96, 96), dtype=np.uint8)
    (tmp_path / "cache" / cls.base_folder).mkdir(parents=True)
    files = {"class_names.txt": b"a\nb\nc\nd\ne\nf\ng\nh\ni\nj", "fold_indices.txt": b""}
    for part in ("train", "test", "unlabeled"):  # on disk, columns come before rows
        files |= {f"{part}_X.bin": x.transpose(0, 1, 3, 2).tobytes(),
                  f"{part}_y.bin": np.arange(1, 7, dtype=np.uint8).tobytes()}
    for name, content in files.items():
        (tmp_path / "cache" / cls.base_folder / name).write_bytes(content)
    for part in ("train_list", "test_list"):
        monkeypatch.setattr(cls, part, [[file, None] for file, _ in getattr(cls, part)])
    data = load("stl10", tmp_path)
    assert np.array_equal(data.train[0], x) and data.train[1].tolist() == list(range(6))
    assert np.array_equal(data.test[0], x) and data.classes == list("abcdefghij")
    assert load("stl10", tmp_path, image_size=32).train[0].shape == (6, 3, 32, 32)


def test_svhn(tmp_path, monkeypatch):
    scipy_io = pytest.importorskip("scipy.io")
    cls, x = torchvision.datasets.SVHN, RNG.integers(0, 256, (32, 32, 3, 4), dtype=np.uint8)
    (tmp_path / "cache").mkdir()
    for part in ("train", "test"):  # as MATLAB keeps them; 10 is digit 0
        scipy_io.savemat(tmp_path / f"cache/{part}_32x32.mat", {
            "X": x, "y": np.array([[1], [10], [3], [9]], np.uint8)})
    monkeypatch.setattr(cls, "split_list", {
        part: [*files[:2], None] for part, files in cls.split_list.items()})
    data = load("svhn", tmp_path)
    assert np.array_equal(data.train[0], x.transpose(3, 2, 0, 1))
    assert data.train[1].tolist() == data.test[1].tolist() == [1, 0, 3, 9]
    assert data.classes == list("0123456789")


# ------------------------------------------------------------------------------ folders of images
def test_a_folder_is_decoded_once_and_mapped_into_memory(folder, tmp_path, capsys, monkeypatch):
    data = load(folder, tmp_path)
    assert "decoding 16 images of 32x32 pixels" in capsys.readouterr().out
    x, y, _ = data.train
    assert data.classes == ["cat", "dog"] and y.tolist() == [0] * 8 + [1] * 8
    assert is_that_of(folder / "train/dog/1.png", x[9])
    assert is_that_of(folder / "test/dog/0.png", data.test[0][4])
    assert {0, 1} == set(load(folder, tmp_path, test_size=4).test[1].tolist())  # chosen at random
    if (maps := Path("/proc/self/maps")).exists():
        assert str(tmp_path / "cache/images-") in maps.read_text()
    opened, genuine = [], common.open_image
    monkeypatch.setattr(common, "open_image",
                        lambda *path_and_size: opened.append(0) or genuine(*path_and_size))
    again = load(folder, tmp_path)
    assert len(opened) <= 1 and "decoding" not in capsys.readouterr().out
    assert torch.equal(again.train[0], x) and torch.equal(again.test[0], data.test[0])
    draw(folder / "train/cat/3.png", (1, 2, 3))  # a change
    assert load(folder, tmp_path).train[0][3, :, 5, 5].tolist() == [1, 2, 3] and len(opened) > 9
    opened.clear()
    os.utime(folder / "train/cat/3.png", (0, 0))  # even to a file of the same size
    assert torch.equal(load(folder, tmp_path).train[0][4:], x[4:]) and len(opened) > 9


def test_two_processes_can_decode_at_once(folder, tmp_path, monkeypatch):
    """While this one decodes, another starts, and finishes first."""
    genuine, inside = common.open_image, []

    def open_image(path, *size):
        if path.match("train/cat/5.png") and not inside:
            inside.append(path)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, "getpid", lambda: 1)
                load(folder, tmp_path)
        return genuine(path, *size)
    monkeypatch.setattr(common, "open_image", open_image)
    data = load(folder, tmp_path)
    assert inside and len(list((tmp_path / "cache").iterdir())) == 2  # of training and test images
    assert is_that_of(folder / "train/dog/7.png", data.train[0][15])


def test_images_of_any_kind(folder, tmp_path):
    palette = Image.new("P", (32, 32), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    turned, exif = Image.new("RGB", (32, 32), (0, 0, 250)), Image.Exif()
    turned.paste((250, 0, 0), (0, 0, 16, 32))  # red on the left
    exif[0x0112] = 6  # which a viewer turns clockwise: red at the top
    images = {
        "grey.png": (77, Image.new("L", (32, 32), 77), {}),
        "grey16.png": (128, Image.fromarray(np.full((32, 32), 32896, np.uint16)), {}),
        "black16.tif": (0, Image.fromarray(np.zeros((32, 32), np.uint16)), {}),
        "rgba.png": ([255, 127, 127], Image.new("RGBA", (32, 32), (255, 0, 0, 128)), {}),
        "la.png": (255, Image.new("LA", (32, 32), (9, 0)), {}),
        "palette.png": ([10, 20, 30], palette, {}),
        "see-through.png": (255, palette, dict(transparency=1)),
        "cmyk.JPEG": (255, Image.new("CMYK", (32, 32), (0, 0, 0, 0)), {}),
        "turned.png": ([250, 0, 0], turned, dict(exif=exif))}
    for name, (_, image, more) in images.items():
        image.save(folder / "train/cat" / name, **more)
    x = load(folder, tmp_path).train[0]
    names = sorted(path.name for path in (folder / "train/cat").iterdir())
    for name, (value, *_) in images.items():
        pixel = x[names.index(name), :, 4, 20].numpy()
        assert np.abs(pixel.astype(int) - value).max() <= 1, name


def test_all_images_are_resized_and_cropped_to_the_size_of_the_first(folder, tmp_path):
    wide = Image.new("RGB", (128, 64), (255, 0, 0))
    wide.paste((0, 0, 255), (32, 0, 96, 64))  # the middle half
    for name in ("train/cat/1.png", "test/cat/1.png"):
        wide.save(folder / name)
    draw(folder / "test/cat/2.png", (1, 2, 3), (20, 50))  # what is too small is enlarged
    data = load(folder, tmp_path)
    for x in (data.train[0][1], data.test[0][1]):
        assert (x[2, :, 2:-2] > 250).all() and (x[0, :, 2:-2] < 5).all()
    for first, size in (((20, 90), 32), ((50, 40), 40), ((300, 200), 128)):
        draw(folder / "train/cat/0.png", (1, 2, 3), first)
        assert {x.shape[2:] for x, *_ in load(folder, tmp_path)[:3]} == {(size, size)}
    assert load(folder, tmp_path, image_size=36).test[0].shape[2:] == (36, 36)


def test_left_and_right_arrows_are_told_apart_without_mirroring(folder, tmp_path):
    for path in (folder / "train").rglob("*.png"):
        image = Image.new("RGB", (32, 32), "black")
        image.paste("white", (0, 0, 16, 32) if path.parent.name == "cat" else (16, 0, 32, 32))
        image.save(path)
    for no_flip in (True, False):
        data, args = load(folder, tmp_path), data_options(batch_size=15, epochs=9, no_flip=no_flip)
        right = torch.cat([(x[:, 0, 16, 24] > 0.5).long() == y for epoch in range(9)
                           for x, y in common.batches(data, args, epoch)]).float().mean()
        assert right == 1 if no_flip else 0.3 < right < 0.7


# ----------------------------------------------------------------------------- layouts of a folder
@pytest.mark.parametrize("name", ["test", "val", "validation", "valid", "Testing"])
def test_names_of_the_test_folder(folder, tmp_path, name):
    """Where there are several, the first of these. ImageNet's test/ is unlabelled."""
    if name == "test":
        shutil.copytree(folder / "test", folder / "val")
    else:
        (folder / "test").rename(folder / name)
        draw(folder / "test/ILSVRC2012_test_1.png", (7, 7, 7))
        draw(folder / "test/unknown/ILSVRC2012_test_2.png", (7, 7, 7))
    if name == "Testing":
        (folder / "train").rename(folder / "Training")
    draw(folder / name / "cat/0.png", (1, 2, 3))
    data = load(folder, tmp_path)
    assert len(data.train[1]) == 16 and data.test[1].tolist() == [0] * 4 + [1] * 4
    assert data.test[0][0, :, 5, 5].tolist() == [1, 2, 3]


def test_class_folders_alone(tmp_path, capsys):
    """A seventh is set aside for the test, always the same. The classes are sorted."""
    for i, name in enumerate(("1", "10", "train")):
        for j in range(14):
            draw(tmp_path / f"numbers/{name}/{j}.png", (i, j, 9))
    data, again = (load(tmp_path / "numbers", tmp_path, seed=seed) for seed in (0, 1))
    assert "no test images of its classes; 6 are set aside" in capsys.readouterr().out
    assert data.classes == ["1", "10", "train"] and torch.equal(data.test[0], again.test[0])
    colours = [{tuple(x.tolist()) for x in part[0][:, :, 5, 5]} for part in (data.train, data.test)]
    assert len(colours[0]) == 36 and len(colours[1]) == 6 and not colours[0] & colours[1]
    for x, y, *_ in (data.train, data.test):
        assert torch.equal(x[:, 0, 5, 5].long(), y)
    draw(tmp_path / "numbers/train/new.png", (2, 99, 9))  # moves one of the others at most
    common.list_folder.cache_clear()
    more = {tuple(x.tolist()) for x in load(tmp_path / "numbers", tmp_path).test[0][:, :, 5, 5]}
    assert len(more) == 7 and len(colours[1] & more) >= 5


def test_tiny_imagenet(tmp_path):
    root = tmp_path / "cache/tiny-imagenet-200"
    for i, name in enumerate(("n01", "n02")):
        draw(root / f"train/{name}/images/{name}_0.JPEG", (9, 9, 100 * i), (64, 64))
        (root / f"train/{name}/{name}_boxes.txt").write_text(f"{name}_0.JPEG\t0\t0\t62\t62\n")
    for i in range(3):
        draw(root / f"val/images/val_{i}.JPEG", (9, 9, 100 * i), (64, 64))
    draw(root / "test/images/test_0.JPEG", (9, 9, 9), (64, 64))  # has no labels
    (root / "val/val_annotations.txt").write_text("".join(
        f"val_{i}.JPEG\tn0{label}\t0\t0\t62\t62\n" for i, label in ((2, 2), (0, 1), (1, 2))))
    data = load("tiny-imagenet", tmp_path)
    assert data.classes == ["n01", "n02"] and data.train[0].shape == (2, 3, 64, 64)
    assert data.test[0][:, 2, 5, 5].tolist() == pytest.approx([200, 0, 100], abs=9)
    assert data.test[1].tolist() == [1, 0, 1]


def test_what_is_no_image_is_passed_over_and_counted(folder, tmp_path, capsys):
    for name in (".ipynb_checkpoints/0.png", "__MACOSX/cat/0.png", "cat/deeper/UPPER.JPG"):
        draw(folder / "train" / name, "red")
    for name in ("cat/._0.png", "cat/.DS_Store", "dog/__MACOSX/0.png",
                 "cat/notes.txt", "dog/0.heic", "dog/without"):  # these three are counted
        (folder / "train" / name).parent.mkdir(exist_ok=True)
        (folder / "train" / name).write_text("no image")
    data = load(folder, tmp_path)
    assert data.classes == ["cat", "dog"] and torch.bincount(data.train[1]).tolist() == [9, 8]
    out = capsys.readouterr().out
    found = set(re.findall(r"\.(?!png)\w+|none", out))
    assert "skipped 3 files" in out and found == {".txt", ".heic", "none"}


# ------------------------------------------------------------------------------------ bad folders
def test_other_classes_in_train_and_test_are_refused(folder, refused):
    shutil.copytree(folder / "test", folder / "train/test")
    assert "differ in the classes ['test']" in refused(folder / "train")
    shutil.rmtree(folder / "train/test")
    (folder / "test/dog").rename(folder / "test/horse")
    assert re.search(f"{re.escape(str(folder / 'test'))} .*dog.*horse", refused(folder))
    shutil.rmtree(folder / "test/horse")
    assert "dog" in refused(folder)
    shutil.rmtree(folder / "train/dog")  # one class, as where a folder is wrapped in another
    assert "several classes in CLASS/* or train/CLASS/*" in refused(folder)


@pytest.mark.parametrize("bad", [b"", "cut", *np.int32([-5, 9, 2**16]), np.uint16(9), np.float32()])
def test_a_broken_image_is_named(folder, tmp_path, refused, bad):
    path = folder / "train/dog/broken.tif"
    if isinstance(bad, str):
        path.write_bytes((folder / "train/dog/3.png").read_bytes()[:500])
    elif isinstance(bad, bytes):
        path.write_bytes(bad)
    else:
        Image.fromarray(np.full((32, 32), bad)).save(path)
    message = refused(folder)
    assert f"{path} cannot be used" in message and "repair or remove it" in message
    assert isinstance(bad, np.number) == ("no known range" in message)
    path.unlink()
    assert len(load(folder, tmp_path).train[1]) == 16
