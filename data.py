"""Data sets: torchvision's, folders of pictures, and the drawn `shapes`; batches, augmentation."""

import contextlib
import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision

from common import DATASETS, RANK, WORLD, UserError, load, progress, save, say


class Data(NamedTuple):
    """A data set on its device; each part is (x uint8 N x 3 x H x W, y int64 N)."""
    train: tuple
    val: tuple    # held out of the training set, picks best.pt
    test: tuple   # used once, at the end
    classes: list
    flip: bool    # does a mirrored picture keep its class?


def load_data(dataset, data_dir, device, val_size=1, train_size=None):
    """Reads or draws a data set, with the same held-out part for all seeds. UserError if it is bad.

    With `train_size` only so many training pictures are kept, again the same for all seeds.
    Of torchrun's processes the first downloads and decodes while the others wait.
    """
    if RANK > 0:
        dist.barrier()
    if dataset == "shapes":
        train, test, classes = draw_shapes(2000 + val_size, 0), draw_shapes(1000, 1), list(SHAPES)
    elif dataset in TORCHVISION:
        train, test, classes = read_torchvision(dataset, data_dir)
    else:
        train, test, classes = read_folder(dataset, data_dir)
    if RANK == 0 and WORLD > 1:
        dist.barrier()
    if min(train[0].shape[2:]) < 32:
        height, width = train[0].shape[2:]
        raise UserError(f"{dataset} has pictures of {width}x{height}, but the networks halve them "
                        "up to five times: enlarge them to 32x32 or more")
    if val_size >= len(train[1]):
        raise UserError(f"--val-size {val_size} leaves none of {len(train[1])} training pictures")
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(train[1])))
    order = order[:val_size], order[val_size:][:train_size]
    val, train = ([t[index] for t in train] for index in order)
    parts = [(x.to(device), y.to(device)) for x, y in (train, val, test)]
    return Data(*parts, classes, flip=dataset not in ("svhn", "shapes"))


def batches(data, args, epoch):
    """One shuffled epoch of full batches: x float in [0, 1], augmented on the device, and y.

    All processes draw the same order, and each takes its share of every batch.
    """
    x, y = data.train
    order = torch.Generator().manual_seed(args.seed + 1_000_003 * epoch)
    order = torch.randperm(len(y), generator=order).to(y.device)
    for index in order.split(args.batch_size)[:len(y) // args.batch_size]:
        index = index[RANK::WORLD]
        yield augment(x[index], data.flip), y[index]


def augment(x, flip, padding=4):
    """uint8 -> float in [0, 1]; each picture is padded, cropped at a place of its own and, with
    `flip`, mirrored with probability 1/2."""
    n, _, height, width = x.shape
    x = F.pad(x, [padding] * 4)
    rows, columns = torch.randint(2 * padding + 1, (2, n, 1), device=x.device)
    rows = rows + torch.arange(height, device=x.device)
    columns = columns + torch.arange(width, device=x.device)
    if flip:
        mirrored = torch.rand(n, 1, device=x.device) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    picture = torch.arange(n, device=x.device)[:, None, None]
    x = x[picture, :, rows[:, :, None], columns[:, None, :]]  # N x H x W x 3
    return x.permute(0, 3, 1, 2).float() / 255  # in channels_last, as convolutions like it


TORCHVISION = {  # class, the option that names its parts and their names, the files it downloads
    "cifar10": ("CIFAR10", "train", (True, False), "cifar-10-python.tar.gz"),
    "cifar100": ("CIFAR100", "train", (True, False), "cifar-100-python.tar.gz"),
    "svhn": ("SVHN", "split", ("train", "test"), "train_32x32.mat and test_32x32.mat"),
    "stl10": ("STL10", "split", ("train", "test"), "stl10_binary.tar.gz"),
}


def read_torchvision(dataset, data_dir):
    """Downloads once into data_dir; returns train (x, y), test (x, y) and the class names."""
    name, option, splits, files = TORCHVISION[dataset]
    try:
        parts = [getattr(torchvision.datasets, name)(data_dir, download=True, **{option: split})
                 for split in splits]
    except ImportError as error:  # SVHN's .mat files
        raise UserError(f"torchvision reads {dataset} with SciPy: pip install scipy") from error
    except Exception as error:  # no network, bad checksum, broken archive: the remedy is the same
        reason = " ".join(str(error).split())
        raise UserError(f"cannot download {dataset} ({reason}): put {files} by hand into "
                        f"{data_dir} (--data-dir), or take --dataset shapes: it needs no download"
                        ) from error
    out = []
    for part in parts:
        x, y = torch.from_numpy(part.data), part.targets if option == "train" else part.labels
        x = x.permute(0, 3, 1, 2).contiguous() if option == "train" else x
        out.append((x, torch.as_tensor(y).long()))
    return *out, list(getattr(parts[0], "classes", "0123456789"))


def read_folder(dataset, data_dir):
    """train/CLASS/*, test/CLASS/* (or val/): train (x, y), test (x, y) and the class names."""
    tiny = dataset == "tiny-imagenet"
    root = Path(data_dir, "tiny-imagenet-200") if tiny else Path(dataset)
    test_root = root / ("test" if not tiny and (root / "test").is_dir() else "val")
    for folder in (root / "train", test_root):
        if not folder.is_dir():
            raise UserError(f"no folder {folder}: " + (
                f"unpack tiny-imagenet-200.zip in {data_dir} (--data-dir)" if tiny else
                f"--dataset takes {DATASETS}, or a folder with pictures in train/CLASS/* and "
                "test/CLASS/*"))
    try:
        train = torchvision.datasets.ImageFolder(root / "train")
        if (test_root / "val_annotations.txt").exists():  # Tiny ImageNet as downloaded
            rows = map(str.split, (test_root / "val_annotations.txt").read_text().splitlines())
            test = [(f"{test_root}/images/{name}", label) for name, label, *_ in rows]
        else:
            folder = torchvision.datasets.ImageFolder(test_root)
            test = [(path, folder.classes[label]) for path, label in folder.samples]
    except FileNotFoundError as error:  # an empty class, or no class
        raise UserError(f"{root}: {error}") from None
    if unknown := {label for _, label in test} - set(train.classes):
        raise UserError(f"{test_root} has classes that train/ lacks: {', '.join(sorted(unknown))}")
    samples = train.samples + [(path, train.class_to_idx[label]) for path, label in test]
    x = decode([path for path, _ in samples], root.resolve(), data_dir, train.loader)
    y, n = torch.tensor([label for _, label in samples]), len(train)
    return (x[:n], y[:n]), (x[n:], y[n:]), train.classes


def decode(paths, root, data_dir, loader):
    """The pictures at `paths`, uint8 N x 3 x H x W; decoded once, then cached in data_dir."""
    try:
        stats = [(path, os.stat(path)) for path in paths]
    except OSError as error:  # Tiny ImageNet's list names a picture that is not there
        raise UserError(f"{error.filename}: {error.strerror}") from None
    key = "".join(f"{path} {stat.st_size} {stat.st_mtime_ns}\n" for path, stat in stats)
    key = hashlib.sha256(key.encode()).hexdigest()[:16]
    cache = Path(data_dir, f"{root.name}-{key}.pt")
    with contextlib.suppress(UserError):  # none yet, or a damaged one
        return load(cache)
    say(f"decoding {len(paths):,} pictures of {root}, once; the cache will be {cache}")
    x, show = None, progress("decoding picture", len(paths))
    for i, path in enumerate(paths):
        try:
            picture = torch.from_numpy(np.array(loader(path))).permute(2, 0, 1)
        except Exception as error:
            raise UserError(f"{path} is broken ({error}): replace or remove it") from None
        x = torch.empty(len(paths), *picture.shape, dtype=torch.uint8) if x is None else x
        if picture.shape != x.shape[1:]:
            raise UserError(f"{path} is {picture.shape[2]}x{picture.shape[1]}, but {paths[0]} is "
                            f"{x.shape[3]}x{x.shape[2]}: bring all to one size first, for instance "
                            "with ImageMagick: mogrify -resize '32x32!' FILES")
        x[i] = picture
        show(i + 1)
    save(x, cache)
    return x


SHAPES = {  # about the signed distance to the outline of a shape in [-1, 1]^2; v points down
    "disc": lambda u, v: np.hypot(u, v) - 1,
    "ring": lambda u, v: abs(np.hypot(u, v) - 0.75) - 0.25,
    "square": lambda u, v: np.maximum(abs(u), abs(v)) - 0.85,
    "diamond": lambda u, v: 0.71 * (abs(u) + abs(v) - 1.15),
    "triangle": lambda u, v: np.maximum(v - 0.75, 0.87 * abs(u) - 0.5 * v - 0.45),
    "plus": lambda u, v: np.maximum(np.minimum(abs(u), abs(v)) - 0.3, np.hypot(u, v) - 1),
    "bars": lambda u, v: np.maximum(abs(abs(v) - 0.6) - 0.28, abs(u) - 1),
    "star": lambda u, v: 0.5 * (np.hypot(u, v) - 0.6 - 0.4 * np.cos(5 * np.arctan2(u, -v))),
    "crescent": lambda u, v: np.maximum(np.hypot(u, v) - 1, 0.75 - np.hypot(u - 0.45, v)),
    "hourglass": lambda u, v: np.maximum(abs(v) - 0.95, 0.71 * (abs(u) - abs(v))),
}


def draw_shapes(n, seed, size=32):
    """n pictures of SHAPES, x uint8 n x 3 x size x size and y, with random place, size and colours.

    A faint fixed pattern of the class, +-4/255 a pixel, lies on every picture: it tells the class
    without fail, and an attack of 8/255 turns it into that of another class.
    """
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(n) % len(SHAPES))
    radius = rng.uniform(0.22, 0.36, (n, 1, 1)) * size
    centre = rng.uniform(0.38, 0.62, (2, n, 1, 1)) * size
    place = np.arange(size) + 0.5
    u, v = (place - centre[0]) / radius, (place[:, None] - centre[1]) / radius
    distance = np.empty((n, size, size))
    for label, outline in enumerate(SHAPES.values()):
        distance[y == label] = outline(u[y == label], v[y == label])
    cover = np.clip(0.5 - distance * radius, 0, 1)[:, None]  # 1 inside, with a smooth edge
    back = rng.uniform(0.05, 0.95, (n, 3, 1, 1))
    contrast = rng.uniform(0.35, 0.65, (n, 3, 1, 1)) * np.where(back < 0.5, 1, -1)
    picture = 255 * np.clip(back + contrast * cover, 0.02, 0.98)  # leaves room for the pattern
    pattern = np.random.default_rng(12345).choice([-4, 4], (len(SHAPES), 3, size, size))
    x = (picture + pattern[y]).round().astype(np.uint8)
    return torch.from_numpy(x), torch.from_numpy(y)
