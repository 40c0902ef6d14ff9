"""What the method scripts share: options, data, models, attack steps, PGD and run bookkeeping.

Outside the data section pictures are floats in [0, 1], N x 3 x H x W. The command line takes eps
and steps in pixels of 255; `pixels` divides by 255, once.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import platform
import shlex
import sys
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # of torchrun


class UserError(Exception):
    """Bad input: one line that says what is wrong and what to do; `main` exits with status 2."""


def main(parse_args, run):
    """Runs a script, run(parse_args()); bad input and Ctrl-C end in one line and status 2."""
    args = argparse.Namespace(out=None)
    try:
        args = parse_args()
        if WORLD > 1:
            dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
        return run(args)
    except UserError as error:
        message = error
    except KeyboardInterrupt:
        message, last = "interrupted", Path(args.out or ".", "last.pt")
        if last.exists():
            message = (f"interrupted: {last} holds all finished epochs; to go on, give the same "
                       f"command with --out {args.out} --resume")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def say(text):
    if RANK == 0:
        print(text, flush=True)


def progress(what, total, done=0):
    """Returns show(done), which tells the time left on stderr: in one line that is rewritten on a
    terminal, in a new line every 20 s elsewhere."""
    terminal, first, start = sys.stderr.isatty(), done, time.perf_counter()
    shown = start

    def show(done):
        nonlocal shown
        now = time.perf_counter()
        if RANK == 0 and now - shown > (0.2 if terminal else 20):
            left = round((now - start) / (done - first) * (total - done))
            line = f"{what} {done}/{total}, {left // 60}:{left % 60:02} left"
            print(f"{line:60}", end="\r" if terminal else "\n", file=sys.stderr, flush=True)
            shown = now
    return show


# ---------------------------------------------------------------------------------------- options

def number(kind, low, high=math.inf):
    """An argparse type: a finite int or float in [low, high]."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            limit = f"between {low} and {high}" if high < math.inf else f"at least {low}"
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {limit}")
        return value
    parse.__name__ = "number"  # argparse says "invalid number value: 'x'"
    return parse


def pixels(text):
    """Pixels of 255 on the command line, [0, 1] units in the program: '8' -> 8/255."""
    if not 0 < float(text) <= 255:
        raise argparse.ArgumentTypeError(f"{text} is out of range: above 0 and at most 255 pixels")
    return float(text) / 255


class Parser(argparse.ArgumentParser):
    """The options of every method; `script` is its __file__, `defaults` are its paper's."""

    class Format(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
        pass

    def __init__(self, script, doc, **defaults):
        super().__init__(Path(script).name, description=doc, formatter_class=self.Format)
        count, positive, share = number(int, 1), number(float, 1e-9), number(float, 0, 1)
        add = self.add_argument_group("options of every method").add_argument
        add("--dataset", default="cifar10", help=f"{DATASETS}, or a folder of pictures")
        add("--data-dir", default="data", metavar="DIR", help="where data sets are kept and cached")
        add("--arch", default="resnet18", choices=ARCHS, metavar="NAME", help=", ".join(ARCHS))
        add("--width", type=count, help="channels of the first stage; None: 64, for wrn-D-K 16 K")
        add("--activation", default="relu", choices=ACTIVATIONS, help="after each BatchNorm")
        add("--eps", type=pixels, default="8", metavar="PIXELS", help="radius of the attack")
        add("--norm", default="linf", choices=["linf", "l2"], help="norm of that radius")
        add("--attack-bn", choices=["eval", "train"], help="BatchNorm in the training attack")
        add("--epochs", type=count, help="passes over the training set")
        add("--batch-size", type=count, default=128, help="pictures per step")
        add("--lr", type=positive, default=0.1, help="the highest learning rate")
        add("--lr-schedule", default="piecewise", choices=["piecewise", "cyclic"],
            help="divided by 10 at each milestone, or up to --lr at half time and back to 0")
        add("--milestones", type=share, nargs="+", default=[0.5, 0.75], help="parts of --epochs")
        add("--weight-decay", type=number(float, 0), default=5e-4, help="on all parameters")
        add("--val-size", type=count, default=1000, help="training pictures held out for best.pt")
        add("--seed", type=number(int, 0, 2**31), default=0, help="of weights, order and noise")
        add("--device", default="auto", help="auto (CUDA, else MPS, else CPU), or one of torch's")
        add("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"],
            help="of training; auto: bf16 where the hardware has it. Results are always fp32")
        add("--compile", action="store_true", help="torch.compile the network for training")
        add("--out", metavar="DIR", help="run folder; None: runs/METHOD-DATASET-ARCH-epsE-seedS")
        add("--resume", action="store_true", help="go on with the run in that folder")
        self.set_defaults(method=Path(script).stem, **defaults)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")

    def parse_args(self, argv=None):
        """The options, with all that depends on the data set or the machine resolved."""
        if self.parse_known_args(argv)[0].dataset == "shapes":
            self.set_defaults(**SHAPES_DEFAULTS)
        args = super().parse_args(argv)
        args.dataset, args.data_dir = find_dataset(args.dataset), os.path.abspath(args.data_dir)
        args.device = find_device(args.device)
        if args.precision == "auto":
            native = (torch.cuda.is_bf16_supported(False) if args.device.startswith("cuda") else
                      args.device == "cpu" and torch.cpu._is_avx512_bf16_supported())
            args.precision = "bf16" if native else "fp32"
        if args.batch_size % WORLD:
            raise UserError(f"--batch-size {args.batch_size} cannot be shared by {WORLD} processes")
        return args


def find_dataset(name):
    """A name of DATASETS as it is, a folder as its absolute path."""
    if name not in DATASETS.split(", ") and not Path(name).is_dir():
        raise UserError(f"unknown data set '{name}': choose {DATASETS}, or a folder with pictures "
                        "in train/CLASS/* and test/CLASS/*")
    return name if name in DATASETS.split(", ") else os.path.abspath(name)


def find_device(name):
    """'auto' or a device of torch -> the name of a device that is here."""
    if name == "auto":
        name = ("cuda" if torch.cuda.is_available() else
                "mps" if torch.backends.mps.is_available() else "cpu")
    if name == "cuda" and WORLD > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"no device '{name}' here: leave out --device, or say cpu") from None
    return name


# ------------------------------------------------------------------------------------------- data

DATASETS = "cifar10, cifar100, svhn, stl10, tiny-imagenet, shapes"
SHAPES_DEFAULTS = dict(arch="resnet10", width=16, epochs=12, val_size=300)  # for a laptop


class Data(NamedTuple):
    """A data set on its device; each part is (x uint8 N x 3 x H x W, y int64 N)."""
    train: tuple
    val: tuple    # held out of the training set, picks best.pt
    test: tuple   # used once, at the end
    classes: list
    flip: bool    # does a mirrored picture keep its class?


def load_data(dataset, data_dir, device, val_size=1):
    """Reads or draws a data set, with the same held-out part for all seeds. UserError if it is bad.

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
    if val_size >= len(train[1]):
        raise UserError(f"--val-size {val_size} leaves none of {len(train[1])} training pictures")
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(train[1])))
    val, train = ([t[index] for t in train] for index in (order[:val_size], order[val_size:]))
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
        raise UserError(f"torchvision cannot read {dataset} ({error}): pip install scipy") from None
    except Exception as error:  # no network, bad checksum, broken archive: the remedy is the same
        raise UserError(f"cannot download {dataset} ({' '.join(str(error).split())}): put {files} "
                        f"into {data_dir} (--data-dir) by hand, or take --dataset shapes, which "
                        "needs no download") from error
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
                "a data set has pictures in train/CLASS/* and test/CLASS/*"))
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
    stats = [(path, os.stat(path)) for path in paths]
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
    without fail, and an attack of 8/255 erases it.
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
    contrast = rng.uniform(0.35, 0.7, (n, 3, 1, 1)) * np.where(back < 0.5, 1, -1)
    picture = 255 * np.clip(back + contrast * cover, 0.02, 0.98)  # leaves room for the pattern
    pattern = np.random.default_rng(12345).choice([-4, 4], (len(SHAPES), 3, size, size))
    x = (picture + pattern[y]).round().astype(np.uint8)
    return torch.from_numpy(x), torch.from_numpy(y)


# ----------------------------------------------------------------------------------------- models

ACTIVATIONS = {"relu": nn.ReLU, "softplus": nn.Softplus, "swish": nn.SiLU}
ARCHS = {
    "resnet10": dict(blocks=(1, 1, 1, 1)),
    "resnet18": dict(blocks=(2, 2, 2, 2)),
    "resnet34": dict(blocks=(3, 4, 6, 3)),
    "resnet50": dict(blocks=(3, 4, 6, 3), bottleneck=True),
    "preactresnet18": dict(blocks=(2, 2, 2, 2), preact=True),
    "preactresnet34": dict(blocks=(3, 4, 6, 3), preact=True),
    "preactresnet50": dict(blocks=(3, 4, 6, 3), preact=True, bottleneck=True),
    "wrn-16-8": dict(blocks=(2, 2, 2), preact=True, stem=16, width=128),
    "wrn-28-10": dict(blocks=(4, 4, 4), preact=True, stem=16, width=160),
    "wrn-34-4": dict(blocks=(5, 5, 5), preact=True, stem=16, width=64),
    "wrn-34-10": dict(blocks=(5, 5, 5), preact=True, stem=16, width=160),
    "vgg16": {},
}


class Classifier(nn.Module):
    """Pictures N x 3 x H x W in [0, 1] -> logits N x C in fp32.

    Normalisation and training's precision are in here: no script and no attack sees them.
    """

    def __init__(self, mean, std):
        super().__init__()
        for name, value in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1), persistent=False)
        self.dtype, self.network = torch.float32, self.logits  # `exact` returns to these

    def forward(self, x):
        x = ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype.itemsize == 2):
            return self.network(x).to(x.dtype)


class Block(nn.Module):
    """Residual block: two 3x3 convolutions, or as a bottleneck 1x1, 3x3 and 1x1."""
    preact = False

    def __init__(self, before, width, stride, activation, bottleneck):
        super().__init__()
        after = 4 * width if bottleneck else width
        kernels, strides = ((1, 3, 1), (1, stride, 1)) if bottleneck else ((3, 3), (stride, 1))
        sizes = [before] + [width] * (len(kernels) - 1) + [after]
        for i, (kernel, step) in enumerate(zip(kernels, strides)):
            conv = nn.Conv2d(sizes[i], sizes[i + 1], kernel, step, kernel // 2, bias=False)
            self.add_module(f"conv{i + 1}", conv)
            self.add_module(f"bn{i + 1}", nn.BatchNorm2d(sizes[i if self.preact else i + 1]))
        self.shortcut = nn.Sequential()
        if stride > 1 or before != after:
            self.shortcut.append(nn.Conv2d(before, after, 1, stride, bias=False))
            if not self.preact:
                self.shortcut.append(nn.BatchNorm2d(after))
        self.activation, self.depth = activation, len(kernels)

    def layers(self):
        for i in range(1, self.depth + 1):
            yield getattr(self, f"conv{i}"), getattr(self, f"bn{i}")

    def forward(self, x):
        out = x
        for i, (conv, bn) in enumerate(self.layers()):
            out = bn(conv(self.activation(out) if i else out))
        return self.activation(out + self.shortcut(x))


class PreActBlock(Block):
    """The same with BatchNorm and activation before each convolution (He et al. 2016b)."""
    preact = True

    def forward(self, x):
        out = self.activation(self.bn1(x))
        shortcut = self.shortcut(out) if len(self.shortcut) else x
        for i, (conv, bn) in enumerate(self.layers()):
            out = conv(self.activation(bn(out)) if i else out)
        return out + shortcut


class ResNet(Classifier):
    """CIFAR ResNet (He et al. 2016a), PreActResNet or, in three stages, WideResNet.

    Parameters have the names of the field's CIFAR ResNets, so that their checkpoints load.
    """

    def __init__(self, classes, width, activation, mean, std, blocks, stem=None, preact=False,
                 bottleneck=False):
        super().__init__(mean, std)
        self.preact, self.stages, self.activation = preact, len(blocks), ACTIVATIONS[activation]()
        channels = stem or width
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        if not preact:
            self.bn1 = nn.BatchNorm2d(channels)
        for stage, count in enumerate(blocks):
            layer = nn.Sequential()
            for i in range(count):
                block, stride = PreActBlock if preact else Block, 2 if stage and not i else 1
                layer.append(block(channels, width << stage, stride, self.activation, bottleneck))
                channels = (width << stage) * (4 if bottleneck else 1)
            self.add_module(f"layer{stage + 1}", layer)
        if preact:
            self.bn = nn.BatchNorm2d(channels)
        self.linear = nn.Linear(channels, classes)

    def logits(self, x):
        x = self.conv1(x) if self.preact else self.activation(self.bn1(self.conv1(x)))
        for stage in range(self.stages):
            x = getattr(self, f"layer{stage + 1}")(x)
        x = self.activation(self.bn(x)) if self.preact else x
        return self.linear(x.mean((2, 3)))


class VGG(Classifier):
    """VGG-16 with BatchNorm (Simonyan & Zisserman 2015), with one linear layer on top."""

    def __init__(self, classes, width, activation, mean, std):
        super().__init__(mean, std)
        layers, channels = [], 3
        for factor in (1, 1, 0, 2, 2, 0, 4, 4, 4, 0, 8, 8, 8, 0, 8, 8, 8, 0):  # 0: pooling
            if factor:
                layers.append(nn.Conv2d(channels, channels := factor * width, 3, padding=1))
                layers += [nn.BatchNorm2d(channels), ACTIVATIONS[activation]()]
            else:
                layers.append(nn.MaxPool2d(2))
        self.features, self.classifier = nn.Sequential(*layers), nn.Linear(channels, classes)

    def logits(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


def build_model(arch, classes, width=None, activation="relu", mean=(0.5,) * 3, std=(0.25,) * 3):
    """An untrained Classifier; `arch` from ARCHS, mean and std of the pictures' three channels."""
    options = {"width": 64} | ARCHS[arch] | ({"width": width} if width else {})
    family = ResNet if "blocks" in options else VGG
    return family(classes, activation=activation, mean=mean, std=std, **options)


def prepare_model(args, data):
    """The network that args ask for, ready for training, normalised by the pictures' statistics."""
    torch.manual_seed(args.seed)
    std, mean = torch.std_mean(data.train[0][:10_000].cpu().float() / 255, dim=(0, 2, 3))
    model = build_model(args.arch, len(data.classes), args.width, args.activation,
                        mean.tolist(), std.clamp(min=1e-3).tolist())
    model = model.to(args.device, memory_format=torch.channels_last)
    model.dtype = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)[args.precision]
    if args.compile:
        model.network = torch.compile(model.logits)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = True, False
    return model


# ---------------------------------------------------------------------------------------- attacks

@contextlib.contextmanager
def attacking(model, x, bn="eval"):
    """Surrounds every attack on x: BatchNorm uses its running ("eval") or the batch's ("train")
    statistics and updates none; modes are restored. ValueError unless 0 <= x <= 1."""
    inside = ((x >= 0) & (x <= 1)).all()
    if x.device.type != "cpu":
        torch._assert_async(inside)  # does not make the host wait
    elif not inside:
        raise ValueError("attacks take pictures in [0, 1]: normalise inside the model")
    before = [(module, module.training) for module in model.modules()]
    norms = [module for module, _ in before if isinstance(module, nn.BatchNorm2d)]
    model.train(bn == "train")
    for module in norms:
        module.track_running_stats = False  # in train mode: batch statistics, kept nowhere
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
        for module in norms:
            module.track_running_stats = True


@contextlib.contextmanager
def exact(model):
    """Eval mode, fp32, uncompiled, deterministic: how every reported number is computed."""
    training, dtype, network = model.training, model.dtype, model.network
    model.dtype, model.network = torch.float32, model.logits
    try:
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            yield model.eval()
    finally:
        model.dtype, model.network = dtype, network
        model.train(training)


def l2_norm(x):
    return x.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def step(x_adv, gradient, x, eps, alpha, norm="linf"):
    """P(x_adv + alpha direction): the gradient's sign for Linf, its direction for L2; then pulled
    back into the eps-ball around x and into [0, 1]. alpha < 0 descends; units of [0, 1]."""
    if norm == "linf":
        delta = (x_adv.detach() + alpha * gradient.sign() - x).clamp(-eps, eps)
    else:
        delta = x_adv.detach() + alpha * gradient / l2_norm(gradient).clamp(min=1e-12) - x
        delta *= eps / l2_norm(delta).clamp(min=eps)
    return (x + delta).clamp(0, 1)


def random_start(x, eps, norm="linf", generator=None):
    """A point drawn uniformly from the eps-ball around x, then clipped to [0, 1]."""
    if norm == "linf":
        noise = torch.empty_like(x).uniform_(-1, 1, generator=generator)
    else:
        noise = torch.empty_like(x).normal_(generator=generator)
        radius = torch.empty_like(x[:, :1, :1, :1]).uniform_(generator=generator)
        noise *= radius ** (1 / x[0].numel()) / l2_norm(noise)
    return (x + eps * noise).clamp(0, 1)


def margin_loss(logits, y):
    """Carlini & Wagner's margin, summed: the highest wrong logit minus the true one."""
    true = F.one_hot(y, logits.shape[1]).bool()
    return (logits.masked_fill(true, -math.inf).amax(1) - logits[true]).sum()


def pgd_attack(model, x, y, eps, alpha, steps, restarts=1, norm="linf", loss="ce", generator=None):
    """Projected gradient ascent (Madry et al. 2018) on loss "ce" or "margin", from random starts.

    x N x 3 x H x W in [0, 1], labels y; eps, alpha in units of [0, 1]. A restart attacks only what
    the earlier ones left right. Returns x_adv: the end of the restart that fooled the model, or
    of the last one. ValueError for x outside [0, 1].
    """
    def objective(logits, y):
        return margin_loss(logits, y) if loss == "margin" else F.cross_entropy(logits, y, reduction="sum")

    x_adv, right = x.clone(), torch.arange(len(x), device=x.device)
    with attacking(model, x):
        for _ in range(restarts):
            clean, label = x[right], y[right]
            point = random_start(clean, eps, norm, generator)
            for _ in range(steps):
                point.requires_grad_()
                gradient, = torch.autograd.grad(objective(model(point), label), point)
                point = step(point, gradient, clean, eps, alpha, norm)
            x_adv[right] = point
            with torch.no_grad():
                right = right[model(point).argmax(1) == label]
            if not len(right):
                break
    return x_adv


def accuracy(model, x, y, attack=None, batch_size=None, show=lambda done: None):
    """Share in percent that is right, in fp32: (clean, under attack). x uint8 N x 3 x H x W.

    attack(model, x, y) -> x_adv sees only the pictures that are right without it.
    """
    size = batch_size or (64 if x.device.type == "cpu" else 1000)
    right, clean = torch.arange(len(y), device=y.device), None
    for perturb in (None, attack) if attack else (None,):
        kept, done = [], 0
        for index in right.split(size):
            picture, label = x[index].float() / 255, y[index]
            with exact(model):
                picture = perturb(model, picture, label) if perturb else picture
                with torch.no_grad():
                    kept.append(index[model(picture).argmax(1) == label])
            done += len(index)
            show(done)
        right = torch.cat(kept)
        clean = 100 * len(right) / len(y) if clean is None else clean
    return clean, 100 * len(right) / len(y)


# ------------------------------------------------------------------------------- run bookkeeping

def learning_rate(args, progress):
    """At `progress` in [0, 1] through the run: piecewise decay, or a triangle, highest half-way."""
    if args.lr_schedule == "cyclic":
        return args.lr * (1 - abs(2 * progress - 1))
    return args.lr * 0.1 ** sum(progress >= milestone for milestone in args.milestones)


@torch.no_grad()
def average(tensors):
    """Replaces each tensor by its mean over torchrun's processes, with one all-reduce."""
    if WORLD > 1:
        tensors = list(tensors)
        flat = torch.cat([tensor.flatten() for tensor in tensors]) / WORLD
        dist.all_reduce(flat)
        for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(mean.view_as(tensor))


def save(content, path):
    """Text, or tensors and plain types, to a temporary file that then takes its place at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(content) if isinstance(content, str) else torch.save(content, temporary)
    os.replace(temporary, path)


def load(path, device="cpu"):
    """Tensors and plain types from a file, of which nothing is ever executed. UserError if bad."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        reason = "does not exist"
    except Exception as error:
        reason = f"is no checkpoint, or is cut short ({str(error).splitlines()[0]})"
        if Path(path).read_bytes()[:200].lstrip().startswith(b"<"):
            reason = "is a web page: download the file itself"
        elif "Weights only load failed" in str(error):
            reason = "holds Python objects, which could execute code: save a state_dict() alone"
    raise UserError(f"{path} {reason}")


def load_weights(model, state, path):
    """A state dict, with whatever prefix, into the model. UserError if it is of another one."""
    state = {name.removeprefix("module.").removeprefix("_orig_mod."): t for name, t in state.items()}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        detail = str(error).splitlines()[1].strip()
        raise UserError(f"{path} holds another architecture ({detail})") from None


def claim_folder(args):
    """The folder of a new run, --out or the next free runs/NAME; with --resume, of an old one."""
    name = f"{args.method}-{Path(args.dataset).name}-{args.arch}-eps{args.eps * 255:g}-seed{args.seed}"
    folders = [Path("runs", name + f"-{i}" * (i > 1)) for i in range(1, 1000)]
    folders = [Path(args.out)] if args.out else folders
    held = [folder for folder in folders if (folder / "args.json").exists()]
    unfinished = [folder for folder in held if not (folder / "result.json").exists()]
    if args.resume:
        if not held:
            raise UserError(f"{folders[0]} holds no run to resume: leave out --resume")
        folder = (unfinished or held)[-1]
        before, differ = json.loads((folder / "args.json").read_text())["args"], []
        for key, value in vars(args).items():
            if key not in ("out", "resume", "data_dir", "device") and before.get(key) != value:
                differ.append(f"--{key.replace('_', '-')} was {before.get(key)}, is {value}")
        if differ:
            raise UserError(f"{folder} was begun with other settings: {'; '.join(differ)}")
        return folder
    if args.out and held:
        raise UserError(f"{args.out} holds a run, and none is ever overwritten: take another --out, "
                        "or add --resume to go on with it")
    if unfinished:
        say(f"{unfinished[-1]} is unfinished; --resume goes on with it")
    return next(folder for folder in folders if folder not in held)


class Run:
    """One training in its folder: args.json, log.csv, last.pt and best.pt after every epoch, and
    result.json and curves.png at the end. With --resume it starts from last.pt."""

    def __init__(self, args, data, model, optimizer, scaler):
        folder = [claim_folder(args) if RANK == 0 else None]
        if WORLD > 1:
            dist.broadcast_object_list(folder)
        self.args, self.folder, self.epoch, self.rows = args, folder[0], 0, []
        self.data, self.model, self.optimizer, self.scaler = data, model, optimizer, scaler
        sizes, (n, _, height, width) = [f"{len(y):,}" for _, y in data[:3]], data.train[0].shape
        self.steps = n // args.batch_size
        if not self.steps:
            raise UserError(f"--batch-size {args.batch_size} exceeds the {n} training pictures")
        args.out = str(self.folder)
        if args.resume and (self.folder / "last.pt").exists():
            state = load(self.folder / "last.pt", args.device)
            load_weights(model, state["model"], self.folder)
            optimizer.load_state_dict(state["optimizer"])
            scaler.load_state_dict(state["scaler"])
            self.epoch, self.rows = state["epoch"], state["rows"]
        device = torch.cuda.get_device_name(args.device) if "cuda" in args.device else platform.machine()
        self.about = dict(command=shlex.join(sys.argv), args=vars(args), device=device,
                          versions=dict(python=platform.python_version(), numpy=np.__version__,
                                        torch=torch.__version__, torchvision=torchvision.__version__))
        if RANK == 0 and not self.epoch:
            save(json.dumps(self.about, indent=1), self.folder / "args.json")
        say(textwrap.fill(" ".join(f"{key}={value}" for key, value in vars(args).items()), 100,
                          break_long_words=False, break_on_hyphens=False))
        say(f"{sizes[0]} training, {sizes[1]} held-out, {sizes[2]} test pictures of {width}x{height} in "
            f"{len(data.classes)} classes; {sum(p.numel() for p in model.parameters()):,} parameters")
        say(f"{self.folder}, from epoch {self.epoch + 1}")
        say("epoch      lr    loss  val clean %  val PGD-10 %  seconds")
        self.progress = progress("step", args.epochs * self.steps, self.epoch * self.steps)

    def now(self):
        torch.get_device_module(self.args.device).synchronize()
        return time.perf_counter()

    def start_epoch(self):
        """Each epoch has a seed of its own, so that resuming needs no state of random generators."""
        torch.manual_seed(self.args.seed + 1_000_003 * (self.epoch * WORLD + RANK + 1))
        self.model.train()
        self.started = self.now()

    def pgd(self, steps):
        """PGD as it is reported: one restart, step eps / 4, always the same noise."""
        args, generator = self.args, torch.Generator(self.args.device).manual_seed(0)
        return lambda model, x, y: pgd_attack(model, x, y, args.eps, args.eps / 4, steps,
                                              norm=args.norm, generator=generator)

    def end_epoch(self, lr, loss):
        """Held-out accuracy, a row of the log, checkpoints. `loss` is the epoch's mean, a tensor;
        UserError if it is not finite."""
        seconds = self.now() - self.started
        average([loss, *(buffer for buffer in self.model.buffers() if buffer.is_floating_point())])
        if not math.isfinite(loss):
            raise UserError(f"the loss of epoch {self.epoch + 1} is {loss.item()}; {self.folder} keeps "
                            f"epoch {self.epoch}: try a lower --lr, or --precision fp32")
        clean, pgd = accuracy(self.model, *self.data.val, self.pgd(10))
        self.epoch += 1
        say(f"{self.epoch:5}  {lr:6.4f}  {loss:6.3f}  {clean:11.1f}  {pgd:12.1f}  {seconds:7.1f}")
        best = all(pgd > row["val_pgd"] for row in self.rows)
        if self.rows and pgd < self.rows[-1]["val_pgd"] - 20:
            say("warning: PGD accuracy fell by more than 20 points, perhaps catastrophic overfitting: "
                "try a smaller --alpha or more attack steps; best.pt is from before")
        self.rows.append(dict(epoch=self.epoch, lr=lr, loss=loss.item(), val_clean=clean,
                              val_pgd=pgd, seconds=seconds))
        if RANK == 0:
            lines = [self.rows[0], *(row.values() for row in self.rows)]
            save("".join(",".join(map(str, line)) + "\n" for line in lines), self.folder / "log.csv")
            state = dict(model=self.model.state_dict(), args=vars(self.args), epoch=self.epoch,
                         rows=self.rows, classes=self.data.classes,
                         mean=self.model.mean.flatten().tolist(), std=self.model.std.flatten().tolist())
            if best:
                save(state, self.folder / "best.pt")
            state |= dict(optimizer=self.optimizer.state_dict(), scaler=self.scaler.state_dict())
            save(state, self.folder / "last.pt")

    def finish(self):
        """Tests best.pt and last.pt: prints both and their difference, writes result.json."""
        if RANK:
            return
        scores, (x, y) = {}, self.data.test
        say("\n            epoch  val clean %  val PGD-10 %  test clean %  test PGD-20 %")
        for name in ("best", "last"):
            state = load(self.folder / f"{name}.pt", self.args.device)
            if name == "best" or state["epoch"] != scores["best"]["epoch"]:  # else the same weights
                load_weights(self.model, state["model"], name)
                clean, pgd = accuracy(self.model, x, y, self.pgd(20), show=progress("test", len(y)))
            scores[name] = {key: state["rows"][-1][key] for key in ("epoch", "val_clean", "val_pgd")}
            scores[name] |= dict(test_clean=clean, test_pgd=pgd)
        scores["difference"] = {key: scores["best"][key] - scores["last"][key] for key in scores["best"]}
        for name, (epoch, *shares) in ((name, score.values()) for name, score in scores.items()):
            say(f"{name:10}  {epoch:5}" + "".join(f"{v:{w}.2f}" for v, w in zip(shares, (13, 14, 14, 15))))
        say(f"{len(y):,} test pictures; PGD has one restart and step eps/4; held-out PGD-10 chose best.pt")
        seconds = sum(row["seconds"] for row in self.rows)
        result = self.about | scores | dict(n_test=len(y), train_seconds=seconds)
        save(json.dumps(result, indent=1), self.folder / "result.json")
        plot_curves(self.rows, self.folder / "curves.png")
        say(f"{self.folder} holds best.pt last.pt log.csv curves.png args.json result.json")


def plot_curves(rows, path):
    """Training loss, and held-out clean and PGD accuracy, against the epoch."""
    from matplotlib.figure import Figure  # half a second to import
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    (left, right), epochs = figure.subplots(1, 2), [row["epoch"] for row in rows]
    left.plot(epochs, [row["loss"] for row in rows], "o-", color="#555555")
    left.set(xlabel="epoch", ylabel="training loss")
    right.plot(epochs, [row["val_clean"] for row in rows], "o-", label="clean")
    right.plot(epochs, [row["val_pgd"] for row in rows], "s--", label="PGD-10")
    right.set(xlabel="epoch", ylabel="held-out accuracy (%)", ylim=(0, 100))
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
