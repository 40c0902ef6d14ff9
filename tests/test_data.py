"""Loading in each format from tiny files made here, augmentation, and messages for bad data."""

import functools
import hashlib
import http.server
import io
import pickle
import shutil
import sys
import tarfile
import threading
import types

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import common
import data
from conftest import data_options

RNG = np.random.default_rng(0)


# ------------------------------------------------------------------------------------ augmentation

def test_augment_crops_each_picture_at_its_own_place_uniformly():
    """A picture that holds its own coordinates tells where it was cropped."""
    torch.manual_seed(0)
    grid = torch.arange(1, 33)
    picture = torch.stack([grid[:, None].expand(32, 32), grid.expand(32, 32),
                           torch.full((32, 32), 99)])
    x = data.augment(picture.byte().expand(8100, 3, 32, 32), flip=False) * 255
    rows, columns = x[:, 0, 16, 16].round().long() - 17, x[:, 1, 16, 16].round().long() - 17
    counts = torch.bincount((rows + 4) * 9 + columns + 4, minlength=81)
    assert len(counts) == 81 and ((counts - 100).abs() < 45).all()
    padded = torch.nn.functional.pad(picture, [4] * 4)
    for i in (0, 1, 2):  # the whole picture, padding included
        expected = padded[:, rows[i] + 4:rows[i] + 36, columns[i] + 4:columns[i] + 36]
        assert torch.equal(x[i].round().long(), expected)
    assert x.is_contiguous(memory_format=torch.channels_last)


def test_augment_mirrors_half_of_the_pictures():
    torch.manual_seed(0)
    picture = torch.arange(32).expand(1000, 3, 32, 32).byte()
    x = data.augment(picture, flip=True, padding=0) * 255
    mirrored = x[:, 0, 0, 0].round() == 31
    assert 430 < mirrored.sum() < 570
    assert torch.equal(x[mirrored][0].round().byte(), picture[0].flip(2))
    assert torch.equal(x[~mirrored][0].round().byte(), picture[0])


def test_batches_are_full_shuffled_and_seeded():
    x = torch.arange(50).byte().view(50, 1, 1, 1).expand(50, 3, 32, 32)
    pets = data.Data((x, torch.arange(50)), None, None, [], flip=False)
    args = types.SimpleNamespace(batch_size=16, seed=0)
    epochs = [[y for _, y in data.batches(pets, args, epoch)] for epoch in (0, 0, 1)]
    assert [len(y) for y in epochs[0]] == [16, 16, 16]
    drawn = [torch.cat(epoch) for epoch in epochs]
    assert drawn[0].unique().numel() == 48
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    for x, y in data.batches(pets, args, 0):  # pictures and labels stay together
        assert torch.equal((x.amax((1, 2, 3)) * 255).round().long(), y)


def test_processes_share_each_batch(monkeypatch):
    x = torch.zeros(40, 3, 8, 8).byte()
    pets = data.Data((x, torch.arange(40)), None, None, [], flip=False)
    args = types.SimpleNamespace(batch_size=10, seed=0)
    whole = [y for _, y in data.batches(pets, args, 0)]
    monkeypatch.setattr(data, "WORLD", 2)
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr(data, "RANK", rank)
        parts.append([y for _, y in data.batches(pets, args, 0)])
    for y, a, b in zip(whole, *parts):
        assert len(a) == len(b) == 5 and set(y.tolist()) == set(a.tolist() + b.tolist())


# ------------------------------------------------------------------------------------------ shapes

def test_shapes():
    x, y = data.draw_shapes(500, 0)
    assert x.shape == (500, 3, 32, 32) and x.dtype == torch.uint8
    assert torch.bincount(y).tolist() == [50] * 10
    again = data.draw_shapes(500, 0)
    assert torch.equal(x, again[0]) and not torch.equal(x, data.draw_shapes(500, 1)[0])


def test_shapes_carry_a_faint_pattern_that_tells_the_class():
    """A matched filter for the pattern reads the class; eps 8/255 is enough to fake any other."""
    x, y = data.draw_shapes(2000, 0)
    pattern = np.random.default_rng(12345).choice([-4, 4], (10, 3, 32, 32))
    pattern = torch.from_numpy(pattern).float()
    mean = torch.nn.functional.avg_pool2d(x.float(), 3, 1, 1, count_include_pad=False)
    texture = x.float() - mean
    scores = (texture.clamp(-12, 12)[:, None] * pattern).sum((2, 3, 4))
    assert (scores.argmax(1) == y).float().mean() > 0.9
    other = (y + 1) % 10
    faked = texture + pattern[other] - pattern[y]  # moves no pixel by more than 8
    scores = (faked.clamp(-12, 12)[:, None] * pattern).sum((2, 3, 4))
    assert (scores.argmax(1) == other).float().mean() > 0.9


def test_a_smaller_training_set_is_a_part_of_the_whole():
    whole, part = (data.load_data(data_options(val_size=50, train_size=size))
                   for size in (None, 70))
    assert torch.equal(part.train[0], whole.train[0][:70]) and len(part.train[1]) == 70
    assert torch.equal(part.val[0], whole.val[0]) and torch.equal(part.test[0], whole.test[0])


def test_label_noise_makes_that_share_of_the_training_labels_wrong_and_no_others():
    clean, noisy, again = (data.load_data(data_options(val_size=50, train_size=900, label_noise=p))
                           for p in (0, 0.3, 0.3))
    assert torch.equal(noisy.train[1], again.train[1])
    right, given = clean.train[1], noisy.train[1]
    assert (right != given).sum() == 270
    shifts = ((given - right) % 10).bincount(minlength=10)[1:]
    assert shifts.min() > 10 and shifts.max() < 60  # 30 of each on average
    assert (right != given)[:450].sum().item() == pytest.approx(135, abs=40)  # everywhere
    for one, other in zip(clean[1:3], noisy[1:3]):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    assert torch.equal(clean.train[0], noisy.train[0])


def test_with_one_class_no_label_can_be_wrong(folder, tmp_path):
    for path in (folder / "train/dog", folder / "test/dog"):
        shutil.rmtree(path)
    with pytest.raises(common.UserError, match="one class"):
        data.load_data(data_options(folder, tmp_path, 1, label_noise=0.5))


def test_held_out_pictures_are_the_same_for_every_run_and_not_trained_on():
    shapes = data.load_data(data_options(val_size=50))
    again = data.load_data(data_options(val_size=50))
    assert torch.equal(shapes.val[0], again.val[0])
    assert [len(y) for _, y in shapes[:3]] == [2000, 50, 1000]
    hashes = [{bytes(x.numpy()) for x in part[0]} for part in shapes[:3]]
    assert not hashes[0] & hashes[1] and not hashes[0] & hashes[2] and not hashes[1] & hashes[2]
    assert not shapes.flip


# ----------------------------------------------------------------------- torchvision's four formats

@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves tmp_path/elsewhere over HTTP, from this machine to itself."""
    monkeypatch.setenv("no_proxy", "*")
    (tmp_path / "elsewhere").mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler,
                                directory=tmp_path / "elsewhere")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def write_cifar(root, monkeypatch, name, server):
    """CIFAR's archive with 5 or 1 training files and a test file; returns pictures and labels."""
    cls = getattr(torchvision.datasets, name)
    fine = "labels" if name == "CIFAR10" else "fine_labels"
    pictures, lists, archive = {}, {}, io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        def add(file, content):
            raw = pickle.dumps(content)
            info = tarfile.TarInfo(f"{cls.base_folder}/{file}")
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
            return [file, hashlib.md5(raw).hexdigest()]
        for part in ("train_list", "test_list"):
            lists[part] = []
            for file, _ in getattr(cls, part):
                x = RNG.integers(0, 256, (4, 3072), dtype=np.uint8)
                y = RNG.integers(0, 10, 4).tolist()
                lists[part].append(add(file, {"data": x, fine: y}))
                pictures.setdefault(part, []).append((x, y))
        classes = [f"class{i}" for i in range(10)]
        meta = add(cls.meta["filename"], {cls.meta["key"]: classes})
    (root / "elsewhere" / cls.filename).write_bytes(archive.getvalue())
    monkeypatch.setattr(cls, "url", f"{server}/{cls.filename}")
    monkeypatch.setattr(cls, "tgz_md5", hashlib.md5(archive.getvalue()).hexdigest())
    monkeypatch.setattr(cls, "meta", cls.meta | {"md5": meta[1]})
    for part, files in lists.items():
        monkeypatch.setattr(cls, part, files)
    return {part: (np.concatenate([x for x, _ in p]).reshape(-1, 3, 32, 32),
                   sum((y for _, y in p), []))
            for part, p in pictures.items()}


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
def test_cifar_is_downloaded_and_read(tmp_path, monkeypatch, name, server):
    pictures = write_cifar(tmp_path, monkeypatch, name, server)
    train, test, classes = data.read_torchvision(name.lower(), str(tmp_path / "data"))
    for part, (x, y) in (("train_list", train), ("test_list", test)):
        assert x.dtype == torch.uint8 and y.dtype == torch.int64
        assert np.array_equal(x, pictures[part][0]) and y.tolist() == pictures[part][1]
    assert classes == [f"class{i}" for i in range(10)]
    assert data.load_data(data_options(name.lower(), tmp_path / "data", 2)).flip


def test_stl10(tmp_path, monkeypatch):
    cls, folder = torchvision.datasets.STL10, tmp_path / torchvision.datasets.STL10.base_folder
    folder.mkdir()
    x = RNG.integers(0, 256, (6, 3, 96, 96), dtype=np.uint8)  # on disk, columns come before rows
    y = np.arange(1, 7, dtype=np.uint8)
    files = {}
    for name in ("train_X", "train_y", "test_X", "test_y", "unlabeled_X"):
        (x.transpose(0, 1, 3, 2) if name.endswith("X") else y).tofile(folder / f"{name}.bin")
        files[name] = hashlib.md5((folder / f"{name}.bin").read_bytes()).hexdigest()
    (folder / "class_names.txt").write_text("\n".join("abcdefghij"))
    (folder / "fold_indices.txt").write_text("")
    listed = [[f"{n}.bin", files[n]] for n in ("train_X", "train_y", "unlabeled_X")]
    monkeypatch.setattr(cls, "train_list", listed)
    monkeypatch.setattr(cls, "test_list", [[f"{n}.bin", files[n]] for n in ("test_X", "test_y")])
    train, test, classes = data.read_torchvision("stl10", str(tmp_path))
    assert np.array_equal(train[0], x) and train[1].tolist() == list(range(6))
    assert np.array_equal(test[0], x) and classes == list("abcdefghij")


def write_svhn(root, monkeypatch):
    cls = torchvision.datasets.SVHN
    lists = {}
    for split in ("train", "test"):
        (root / f"{split}_32x32.mat").write_bytes(split.encode())
        md5 = hashlib.md5(split.encode()).hexdigest()
        lists[split] = [cls.split_list[split][0], f"{split}_32x32.mat", md5]
    monkeypatch.setattr(cls, "split_list", lists)


def test_svhn(tmp_path, monkeypatch):
    """SciPy, which parses .mat files for torchvision, is replaced: the rest is tested."""
    write_svhn(tmp_path, monkeypatch)
    x = RNG.integers(0, 256, (32, 32, 3, 4), dtype=np.uint8)  # as MATLAB keeps it; 10 is digit 0
    scipy, sio = types.ModuleType("scipy"), types.ModuleType("scipy.io")
    y = np.array([[1], [10], [3], [9]], np.uint8)
    scipy.io, sio.loadmat = sio, lambda path: {"X": x, "y": y}
    monkeypatch.setitem(sys.modules, "scipy", scipy)
    monkeypatch.setitem(sys.modules, "scipy.io", sio)
    train, test, classes = data.read_torchvision("svhn", str(tmp_path))
    assert np.array_equal(train[0], x.transpose(3, 2, 0, 1)) and train[1].tolist() == [1, 0, 3, 9]
    assert classes == list("0123456789")
    assert not data.load_data(data_options("svhn", tmp_path)).flip


def test_svhn_without_scipy(tmp_path, monkeypatch):
    write_svhn(tmp_path, monkeypatch)
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(common.UserError, match="pip install scipy"):
        data.read_torchvision("svhn", str(tmp_path))


@pytest.mark.parametrize("fault", ["missing", "cut short"])
@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
def test_a_failed_download_names_the_file_the_folder_and_shapes(tmp_path, monkeypatch, name, fault,
                                                                server):
    write_cifar(tmp_path, monkeypatch, name, server)
    cls = getattr(torchvision.datasets, name)
    file = tmp_path / "elsewhere" / cls.filename
    file.unlink() if fault == "missing" else file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(common.UserError) as error:
        data.read_torchvision(name.lower(), str(tmp_path / "data"))
    message = str(error.value)
    assert "\n" not in message and "--data-dir" in message and "--dataset shapes" in message
    assert cls.filename in message and str(tmp_path / "data") in message


def test_the_files_named_in_messages_are_torchvisions():
    for name, (cls, _, _, files) in data.TORCHVISION.items():
        cls = getattr(torchvision.datasets, cls)
        expected = getattr(cls, "filename", None) or " and ".join(
            cls.split_list[part][1] for part in ("train", "test"))
        assert files == expected


# ---------------------------------------------------------------------------- folders of pictures

def read(folder, tmp_path):
    return data.read_folder(data_options(folder, tmp_path / "cache"))


def test_a_folder_is_decoded_once(folder, tmp_path, capsys):
    (x, y), (x_test, y_test), classes = read(folder, tmp_path)
    assert "decoding 24 pictures" in capsys.readouterr().out
    assert classes == ["cat", "dog"] and y.tolist() == [0] * 8 + [1] * 8 and len(y_test) == 8
    assert np.array_equal(x[9].permute(1, 2, 0), np.asarray(Image.open(folder / "train/dog/1.png")))
    picture = np.asarray(Image.open(folder / "test/cat/0.png"))
    assert np.array_equal(x_test[0].permute(1, 2, 0), picture)
    again = read(folder, tmp_path)
    assert "decoding" not in capsys.readouterr().out  # from the cache
    assert torch.equal(again[0][0], x) and torch.equal(again[1][0], x_test)


def test_the_cache_is_made_again_when_a_picture_changes_or_it_is_damaged(folder, tmp_path, capsys):
    read(folder, tmp_path)
    new = RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(new).save(folder / "train/cat/0.png")
    assert np.array_equal(read(folder, tmp_path)[0][0][0].permute(1, 2, 0), new)
    for cache in (tmp_path / "cache").iterdir():
        cache.write_bytes(cache.read_bytes()[:1000])
    capsys.readouterr()
    assert np.array_equal(read(folder, tmp_path)[0][0][0].permute(1, 2, 0), new)
    assert "decoding" in capsys.readouterr().out


def test_grey_pictures_and_a_val_folder(folder, tmp_path):
    (folder / "test").rename(folder / "val")
    Image.new("L", (32, 32), 77).save(folder / "val/cat/grey.png")
    _, (x, y), _ = read(folder, tmp_path)
    assert len(y) == 9 and (x[4] == 77).all()


def test_a_test_class_keeps_the_number_it_has_in_training(folder, tmp_path):
    shutil.rmtree(folder / "test/cat")
    _, (_, y), _ = read(folder, tmp_path)
    assert y.tolist() == [1] * 4


def test_tiny_imagenet(tmp_path):
    root = tmp_path / "tiny-imagenet-200"
    for wnid in ("n01", "n02"):
        (root / "train" / wnid / "images").mkdir(parents=True)
        picture = Image.new("RGB", (64, 64), (1, 2, 3))
        picture.save(root / "train" / wnid / "images" / f"{wnid}_0.JPEG")
    (root / "val" / "images").mkdir(parents=True)
    (root / "test" / "images").mkdir(parents=True)  # has no labels
    for i in range(3):
        Image.new("RGB", (64, 64), (9, 9, i)).save(root / "val" / "images" / f"val_{i}.JPEG")
    (root / "val" / "val_annotations.txt").write_text(
        "".join(f"val_{i}.JPEG\t{wnid}\t0\t0\t62\t62\n"
                for i, wnid in enumerate(["n02", "n01", "n02"])))
    train, (x, y), classes = data.read_folder(data_options("tiny-imagenet", tmp_path))
    assert classes == ["n01", "n02"] and train[0].shape == (2, 3, 64, 64)
    assert x.shape == (3, 3, 64, 64) and y.tolist() == [1, 0, 1]


def break_folder(folder, fault):
    if fault == "no train":
        shutil.rmtree(folder / "train")
    elif fault == "no test":
        shutil.rmtree(folder / "test")
    elif fault == "empty class":
        (folder / "train" / "bird").mkdir()
    elif fault == "strange class":
        (folder / "test" / "dog").rename(folder / "test" / "horse")
    elif fault == "broken picture":
        file = folder / "train/dog/3.png"
        file.write_bytes(file.read_bytes()[:500])
    elif fault == "no picture":
        (folder / "train/dog/3.png").write_text("<html>")
    elif fault == "sizes":
        Image.new("RGB", (20, 40)).save(folder / "train/dog/3.png")


FAULTS = {"no train": "no folder .*train: .*train/CLASS",
          "no test": "no folder .*val: .*test/CLASS",
          "empty class": "bird", "strange class": "train/ lacks: horse",
          "broken picture": r"dog/3.png cannot be used", "no picture": r"dog/3.png cannot be used",
          "sizes": r"dog/3.png cannot be used .it is 20x40, others are 32x32: --image-size"}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_folder_gets_one_clear_line(folder, tmp_path, fault):
    break_folder(folder, fault)
    with pytest.raises(common.UserError, match=FAULTS[fault]) as error:
        read(folder, tmp_path)
    assert "\n" not in str(error.value)


def test_a_listed_picture_that_is_missing(tmp_path):
    root = tmp_path / "tiny-imagenet-200"
    (root / "train" / "n01").mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(root / "train" / "n01" / "0.JPEG")
    (root / "val").mkdir()
    (root / "val" / "val_annotations.txt").write_text("gone.JPEG\tn01\t0\t0\t62\t62\n")
    with pytest.raises(common.UserError, match="gone.JPEG cannot be used .*No such file"):
        data.read_folder(data_options("tiny-imagenet", tmp_path))


def test_pictures_too_small_for_the_networks(folder, tmp_path):
    for path in folder.rglob("*.png"):
        Image.new("RGB", (32, 16)).save(path)
    with pytest.raises(common.UserError, match="pictures of 32x16.*enlarge"):
        data.load_data(data_options(folder, tmp_path, 2))


def test_too_large_a_held_out_part(folder, tmp_path):
    with pytest.raises(common.UserError, match="--val-size 16 leaves none of 16"):
        data.load_data(data_options(folder, tmp_path, 16))
