"""Data sets: torchvision's, folders of pictures, and the drawn `shapes`; batches, augmentation."""

import contextlib
import copy
import hashlib
import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch.utils.data import DataLoader
from torchvision.transforms.functional import center_crop, resize

from bookkeeping import load, save
from common import DATASETS, RANK, WORLD, UserError, progress, read, say


class Data(NamedTuple):
    """A data set on its device; each part is (x uint8 N x 3 x H x W, y int64 N), where x may also
    be a Stream of such pictures."""
    train: tuple
    val: tuple    # held out of the training set, picks best.pt
    test: tuple   # used once, at the end
    classes: list
    flip: bool    # does a mirrored picture keep its class?


def load_data(args):
    """Reads or draws args.dataset, with the same held-out part for all seeds. UserError if it is
    bad.

    With args.train_size only so many training pictures are kept, and args.label_noise gives that
    share of them a wrong label, each as likely; both again the same for all seeds.
    Of torchrun's processes the first downloads and decodes while the others wait.
    """
    dataset, data_dir, size = args.dataset, args.data_dir, args.image_size
    if RANK > 0:
        dist.barrier()
    if dataset == "shapes":
        train, test = draw_shapes(2000 + args.val_size, 0), draw_shapes(1000, 1)
        classes = list(SHAPES)
    elif dataset in TORCHVISION:
        train, test, classes = read_torchvision(dataset, data_dir)
    else:
        train, test, classes = read_folder(args)
    if RANK == 0 and WORLD > 1:
        dist.barrier()
    if size and train[0].shape[2:] != (size, size):  # folders come in that size already
        train, test = ((torch.cat([center_crop(resize(part, size), size)
                                   for part in x.split(1000)]), y) for x, y in (train, test))
    if min(train[0].shape[2:]) < 32:
        height, width = train[0].shape[2:]
        raise UserError(f"{dataset} has pictures of {width}x{height}, but the networks halve them "
                        "up to five times: enlarge them, for instance by --image-size 32")
    n = len(train[1])
    if args.val_size >= n:
        raise UserError(f"--val-size {args.val_size} leaves none of {n} training pictures")
    order = torch.from_numpy(np.random.default_rng(0).permutation(n))
    order = order[:args.val_size], order[args.val_size:][:args.train_size]
    val, train = ([t[index] for t in train] for index in order)
    if args.label_noise:
        if len(classes) < 2:
            raise UserError(f"--label-noise: {dataset} has one class, so no label can be wrong")
        rng, n = np.random.default_rng(1), len(train[1])
        wrong = rng.permutation(n)[:round(args.label_noise * n)]
        shift = torch.from_numpy(rng.integers(1, len(classes), len(wrong)))
        train[1][wrong] = (train[1][wrong] + shift) % len(classes)
    parts = [(x.to(args.device), y.to(args.device)) for x, y in (train, val, test)]
    return Data(*parts, classes, flip=dataset not in ("svhn", "shapes"))


def batches(data, args, epoch):
    """One shuffled epoch of full batches: x float in [0, 1], augmented on the device, and y.

    All processes draw the same order, and each takes its share of every batch.
    """
    x, y = data.train
    order = torch.Generator().manual_seed(args.seed + 1_000_003 * epoch)
    order = torch.randperm(len(y), generator=order).to(y.device)
    parts = order.split(args.batch_size)[:len(y) // args.batch_size]
    for index, picture in read(x, [part[RANK::WORLD] for part in parts]):
        if not len(index):
            raise UserError("not one picture of a batch can be read: is the disk still there?")
        yield augment(picture, data.flip), y[index]


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


def read_folder(args):
    """train/CLASS/*, test/CLASS/* (or val/): train (x, y), test (x, y) and the class names. x is in
    memory if there is room, else a Stream."""
    tiny = args.dataset == "tiny-imagenet"
    root = Path(args.data_dir, "tiny-imagenet-200") if tiny else Path(args.dataset)
    test_root = root / ("test" if not tiny and (root / "test").is_dir() else "val")
    for folder in (root / "train", test_root):
        if not folder.is_dir():
            raise UserError(f"no folder {folder}: " + (
                f"unpack tiny-imagenet-200.zip in {args.data_dir} (--data-dir)" if tiny else
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
    paths, labels = zip(*train.samples, *((path, train.class_to_idx[name]) for path, name in test))
    x, y, n = Stream(paths, args), torch.tensor(labels), len(train)
    if not args.stream and fits(x.shape.numel(), args.device):
        x, kept = decode_once(x, root.resolve(), args)
        y, n = y[kept], int(kept[:n].sum())
    return (x[:n], y[:n]), (x[n:], y[n:]), train.classes


def fits(size, device):
    """Is there room for so many bytes, of the host's memory and the device's, beside a training?"""
    free = [size * 4]
    if hasattr(os, "sysconf"):  # not on Windows
        copies = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        free.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // copies)
    if device.startswith("cuda"):
        free.append(torch.cuda.mem_get_info(device)[0])
    return 4 * size <= min(free)


class Stream:
    """Pictures that stay on disk, in place of a uint8 tensor N x 3 x H x W: it has a shape, an
    index takes a part of it, and `read` reads. UserError if it holds no picture."""

    def __init__(self, paths, args):
        self.paths = np.array([os.fsencode(path) for path in paths])  # as a list it would be copied
        self.size, self.skip, self.device = args.image_size, args.on_bad_file == "skip", "cpu"
        self.told, self.form = set(), (3, args.image_size, args.image_size)
        if not self.size:  # then the first one that can be read tells
            for path in map(os.fsdecode, self.paths):
                with contextlib.suppress(Exception):
                    self.form = open_picture(path, None).shape
                    return
            raise UserError(f"{path}, like all before it, is no picture")

    @property
    def shape(self):
        return torch.Size([len(self.paths), *self.form])

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        part = copy.copy(self)
        part.paths = self.paths[np.asarray(index.cpu()) if torch.is_tensor(index) else index]
        return part

    def to(self, device):
        """The same, with pictures that are read to this device."""
        self.device = device
        return self

    def read(self, parts):
        """(index, its pictures) for each index tensor of `parts`, decoded ahead by processes of
        their own. One that cannot be used stops the program or, as --on-bad-file has it, is named
        once and left out. UserError."""
        parts, cores = list(parts), os.cpu_count()
        if hasattr(os, "sched_getaffinity"):  # those that this process may use
            cores = len(os.sched_getaffinity(0))
        loader = DataLoader(
            self, batch_size=None, sampler=[part.cpu() for part in parts], collate_fn=decode,
            num_workers=min(len(parts), max(1, cores // WORLD)), generator=torch.Generator(),
            multiprocessing_context="fork" if sys.platform == "linux" else None,
            pin_memory=self.device.startswith("cuda"))
        try:
            for index, (good, pictures, broken) in zip(parts, loader):
                for path, reason in broken.items():
                    what = f"{path} cannot be used ({reason})"
                    if not self.skip:
                        raise UserError(f"{what}: replace or remove it, or --on-bad-file skip")
                    if path not in self.told:
                        print(f"skipping a bad file: {what}", file=sys.stderr)
                        self.told.add(path)
                yield index[good.to(index.device)], pictures.to(self.device, non_blocking=True)
        except RuntimeError as error:  # one of those processes was killed
            raise UserError(f"reading pictures failed: {' '.join(str(error).split())}") from None


def open_picture(path, size):
    """A file's picture, uint8 3 x H x W, with `size` brought to size x size."""
    picture = torchvision.datasets.folder.default_loader(path)
    if size:
        picture = center_crop(resize(picture, size), size)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def decode(part):
    """Of a Stream: the places and the pictures of those that can be used, and by path why others
    cannot."""
    good, pictures, broken = [], torch.empty(part.shape, dtype=torch.uint8), {}
    for i, path in enumerate(map(os.fsdecode, part.paths)):
        try:
            picture = open_picture(path, part.size)
            if picture.shape != pictures.shape[1:]:
                sizes = ["{2}x{1}".format(*x.shape[-3:]) for x in (picture, pictures)]
                raise ValueError("it is {}, others are {}: --image-size brings all to one size"
                                 .format(*sizes))
            pictures[len(good)] = picture
            good.append(i)
        except Exception as error:  # PIL raises nearly anything
            broken[path] = " ".join(str(error).split())
    return torch.tensor(good, dtype=torch.int64), pictures[:len(good)], broken


def decode_once(stream, root, args):
    """All pictures of a Stream, and which of them those are, bool N; cached in data_dir."""
    stamps = [f"{args.image_size} {args.on_bad_file}"]
    for path in map(os.fsdecode, stream.paths):
        stat = os.stat(path) if os.path.exists(path) else None
        stamps.append(f"{path} {stat and (stat.st_size, stat.st_mtime_ns)}")
    key = hashlib.sha256("\n".join(stamps).encode(errors="surrogateescape")).hexdigest()[:16]
    cache = Path(args.data_dir, f"{root.name}-{key}.pt")
    with contextlib.suppress(UserError, AttributeError, TypeError, ValueError):  # none, or damaged
        x, kept = held if isinstance(held := load(cache), list) else ()
        if (x.dtype, x.shape[1:]) == (torch.uint8, stream.shape[1:]) and kept.dtype == torch.bool:
            if kept.shape == (len(stream),) and kept.sum() == len(x):
                return x, kept
    n = len(stream)
    say(f"decoding {n:,} pictures of {root}, once; the cache will be {cache}")
    x, kept = torch.empty(stream.shape, dtype=torch.uint8), torch.zeros(n, dtype=torch.bool)
    show = progress("decoding picture", n)
    for index, pictures in stream.read(torch.arange(n).split(256)):
        x[index], kept[index] = pictures, True
        show(int(index[-1]) + 1 if len(index) else 1)
    x = x if kept.all() else x[kept]
    try:
        save([x, kept], cache)
    except UserError as error:
        say(f"warning: no cache: {error}")
    return x, kept


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
