"""What the five method scripts share: options, data, models, attacks, evaluation, training runs.

Images are float tensors N x C x H x W in [0, 1] unless uint8 is mentioned. eps and step sizes are
in units of 1/255 on the command line, and in units of [0, 1] everywhere else.
"""

import argparse
import contextlib
import copy
import csv
import functools
import hashlib
import json
import math
import os
import platform
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.functional import center_crop, resize

TORCHRUN = {"TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys()
RANK, WORLD = (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if TORCHRUN else (0, 1)


def fail(message):
    """Ends the program with one line on stderr and exit status 2: for mistakes of the user."""
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)


# ------------------------------------------------------------------------------------------ options
DATASETS = ("cifar10", "cifar100", "svhn", "stl10", "tiny-imagenet", "shapes")
SMALL = dict(arch="resnet10", width=16, batch_size=32, lr_schedule="cyclic", preset="laptop")


def number(kind, low, high=2**31):
    """An argparse type: an int or a float within [low, high]."""
    def number(text):  # argparse's message: "invalid number value"
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return kind(text)
    return number


def over_255(text):
    """An argparse type: '8' (or '8/255') on the command line is 8/255 in the program."""
    value = number(float, 0)(text.removesuffix("/255"))
    if 0 < value <= 0.5 and "/" not in text:  # 0.5 is a usual radius in L2
        raise argparse.ArgumentTypeError(f"did you mean {255 * value:.4g}/255, or {text}/255?")
    return value / 255


def dataset_name(text):
    """An argparse type: a known data set, however it is spelled, or a folder's absolute path."""
    name = text.lower().replace("-", "").replace("_", "").replace("tinyimagenet", "tiny-imagenet")
    if name not in DATASETS and not os.path.isdir(text):
        fail(f"--dataset {text} is not a folder, nor one of {', '.join(DATASETS)}")
    return name if name in DATASETS else os.path.abspath(text)


class Parser(argparse.ArgumentParser):
    error = staticmethod(fail)  # one line, without the list of all options
    class Format(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
        pass


def training_parser(script, doc, **defaults):
    """A parser with the options of every method; `defaults` are those of the method's paper."""
    parser = Parser(usage="%(prog)s [options]", description=doc, formatter_class=Parser.Format)
    add = parser.add_argument_group("options of every method").add_argument
    count, share = number(int, 1), number(float, 0, 1)
    add("--dataset", type=dataset_name, default="cifar10", help=f"folder, {', '.join(DATASETS)}")
    add("--data-dir", default="data", metavar="DIR", help="where data sets are stored")
    add("--image-size", type=number(int, 32, 4096), help="resize the shorter side to this and crop "
        "the centre; None: as they are, or in a folder as the first image, at most 128")
    add("--no-flip", action="store_true", help="do not mirror training images (digits, signs)")
    add("--arch", default="resnet18", choices=ARCHS, metavar="NAME", help=", ".join(ARCHS))
    add("--width", type=number(int, 16), help="channels of the first stage; None: 64, wrn-D-K 16 K")
    add("--activation", default="relu", choices=ACTIVATIONS, help="of the network")
    add("--eps", type=over_255, help="perturbation radius, in units of 1/255; None: 8, in l2 128")
    add("--norm", default="linf", choices=["linf", "l2"], help="norm of the perturbation")
    add("--attack-bn", choices=["eval", "train"], help="BatchNorm in the attack; None: the paper's")
    add("--epochs", type=count, help="passes over the training images")
    add("--batch-size", type=count, default=128, help="of all processes together")
    add("--lr", type=number(float, 1e-9), default=0.1, help="the highest learning rate")
    add("--lr-schedule", default="piecewise", choices=["piecewise", "cyclic", "cosine"],
        help="divided by 10 at --milestones; linearly up to --lr and down; half a cosine")
    add("--milestones", type=share, nargs="+", default=[0.5, 0.75], help="as parts of --epochs")
    add("--weight-decay", type=number(float, 0), default=5e-4, help="on all parameters")
    add("--val-size", type=count, default=1000, help="training images held out to choose best.pt")
    add("--train-size", type=count, help="number of training images; None: all")
    add("--test-size", type=count, help="number of test images; None: all")
    add("--init-from", metavar="CKPT", help="fine-tuning: start from a best.pt or last.pt")
    add("--label-noise", type=share, default=0.0, help="share of training labels that are wrong")
    add("--keep-epochs", action="store_true", help="keep a checkpoint of every epoch")
    add("--seed", type=number(int, 0), default=0, help="of the weights, the order and the noise")
    add("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"], help="to compute on")
    add("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"], help="of training")
    add("--compile", action="store_true", help="use torch.compile")
    add("--out", metavar="DIR", help="run folder; None: runs/METHOD-DATASET-ARCH-epsE-seedS")
    add("--resume", action="store_true", help="continue the run in --out, else the newest one")
    parser.set_defaults(method=Path(script).stem, preset="paper", **defaults)
    return parser


def parse(parser, argv=None):
    """Parses a method's options; the defaults depend on data set, machine and --resume."""
    words = sys.argv[1:] if argv is None else argv
    args = parser.parse_known_args([word for word in words if word not in ("-h", "--help")])[0]
    device = set_up(args.device)
    saved = saved_settings(args) if args.resume else {}
    parser.set_defaults(**saved or small_preset(args.dataset, args.data_dir))
    args = parser.parse_args(words)
    for name in saved.keys() - {"dataset", "data_dir", "device", "epochs", "keep_epochs"}:
        if vars(args)[name] != saved[name]:
            fail(f"--{name.replace('_', '-')} differs from {args.out}: omit it, or set --out")
    args.device = device
    args.eps = (128 if args.norm == "l2" else 8) / 255 if args.eps is None else args.eps
    if args.precision == "auto":
        native = (torch.cuda.is_bf16_supported(False) if args.device == "cuda" else
                  args.device == "cpu" and torch.cpu._is_avx512_bf16_supported())
        args.precision = "bf16" if native else "fp32"
    return args


def small_preset(dataset, data_dir="data"):
    """Defaults for `shapes`, SVHN, and a folder of few images or where there is no GPU."""
    if dataset in DATASETS:
        drawn = SMALL | dict(epochs=8, val_size=200, test_size=500, batch_size=16, lr=0.05)
        return {"shapes": drawn | dict(no_flip=True), "svhn": dict(no_flip=True)}.get(dataset, {})
    n = len(list_folder(dataset, data_dir)[0][0])
    small = SMALL | dict(epochs=min(max(20_000 // n, 6), 100), val_size=min(max(n // 10, 1), 1000),
                         batch_size=min(max(n // 8, 4), 32))
    return {} if n >= 5000 and torch.cuda.is_available() else small


def set_up(device):
    """Finds the device; torchrun's processes join each other, and each takes a GPU of its own."""
    here = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    if device not in ("auto", "cpu", *here):
        fail(f"there is no {device} on this machine: leave out --device")
    device = [*here, "cpu"][0] if device == "auto" else device
    if WORLD > 1 and not dist.is_initialized():
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
        sys.stdout = sys.stdout if RANK == 0 else open(os.devnull, "w")  # one prints for all
    getattr(sys.stdout, "reconfigure", dict)(errors="replace")  # a console may lack a character
    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = True, False
    return device


def progress(items, label, done=0, total=None):
    """Yields the items of a sequence, and shows how many are done and the time left on stderr."""
    start = shown = time.perf_counter()
    for i, item in enumerate(items, 1):
        yield item
        now, terminal, n = time.perf_counter(), sys.stderr.isatty(), total or len(items)
        if RANK == 0 and now - shown > (0.2 if terminal else 20):
            shown, left = now, round((now - start) / i * (n - done - i))
            print(f"{label} {done + i}/{n}, {left // 60}:{left % 60:02} left".ljust(60),
                  end="\r" if terminal else "\n", file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------- data
class Data(NamedTuple):
    """A data set: images x uint8 N x 3 x H x W and labels y int64 N."""
    train: tuple  # x, y and the indices of those to train on
    val: tuple  # held out of the training images to choose best.pt
    test: tuple  # used once, at the end
    classes: list


def load_data(args):
    """Loads args.dataset. What is held out, left out or mislabelled is the same for all seeds."""
    if RANK > 0:
        dist.barrier()  # the first process downloads and decodes, the others wait
    if args.dataset == "shapes":
        draw = functools.partial(draw_shapes, size=args.image_size or 32)
        (x, y), test, classes = draw(2200, 0), draw(1000, 1), list(SHAPES)
    elif args.dataset == "tiny-imagenet" or args.dataset not in DATASETS:
        (paths, y), test, classes = list_folder(args.dataset, args.data_dir)
        x, y = decode(paths, args), torch.tensor(y)
        test = decode(test[0], args, x.shape[-1]), torch.tensor(test[1])
    else:
        (x, y), test, classes = read_torchvision(args)
    if RANK == 0 and WORLD > 1:
        dist.barrier()
    order, test_order = (torch.from_numpy(np.random.default_rng(0).permutation(len(part)))
                         for part in (y, test[1]))
    if args.val_size >= len(order) or (args.test_size or 0) > len(test_order):
        fail(f"--val-size must be below {len(order)}, --test-size at most {len(test_order)}")
    held_out, index = order[:args.val_size], order[args.val_size:][:args.train_size]
    noisy = index[:round(args.label_noise * len(index))]
    shift = np.random.default_rng(0).integers(1, len(classes), len(noisy))
    y = y.index_put((noisy,), (y[noisy] + torch.from_numpy(shift)) % len(classes))
    if args.test_size:
        test = [part[test_order[:args.test_size]] for part in test]
    # x goes to the device if it takes up to 2 GB; of a larger one the images that are needed do.
    parts = [(x.to(args.device) if x.nbytes <= 2**31 else x, y.to(args.device))
             for x, y in ((x, y), (x[held_out], y[held_out]), test)]
    return Data((*parts[0], index.to(args.device)), *parts[1:], classes)


def batches(data, args, epoch):
    """One epoch of shuffled batches, augmented x and y; each process has its share of every one."""
    x, y, index = data.train
    generator = torch.Generator().manual_seed(args.seed + 1_000_003 * epoch)
    index = index[torch.randperm(len(index), generator=generator).to(index.device)]
    n = len(index) // args.batch_size
    parts = [part[RANK::WORLD] for part in index.split(args.batch_size)[:n]]
    for part in progress(parts, "training step", epoch * n, args.epochs * n):
        yield augment(x[part.to(x.device)].to(part.device), not args.no_flip), y[part]


def augment(x, flip, padding=4):
    """uint8 -> float in [0, 1], each image padded, cropped at random and perhaps mirrored."""
    n, _, height, width = x.shape
    rows, columns = torch.randint(2 * padding + 1, (2, n, 1), device=x.device)
    rows = rows + torch.arange(height, device=x.device)
    columns = columns + torch.arange(width, device=x.device)
    if flip:
        mirrored = torch.rand(n, 1, device=x.device) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    image = torch.arange(n, device=x.device)[:, None, None]
    x = F.pad(x, [padding] * 4)[image, :, rows[:, :, None], columns[:, None, :]]  # N x H x W x 3
    return x.permute(0, 3, 1, 2).contiguous(memory_format=FORMAT).float() / 255


def read_torchvision(args):
    """Downloads a data set once; returns train (x, y), test (x, y) and the names of the classes."""
    dataset = getattr(torchvision.datasets, args.dataset.upper())
    cifar, size = args.dataset.startswith("cifar"), args.image_size
    keyword, parts = ("train", (True, False)) if cifar else ("split", ("train", "test"))
    try:
        sets = [dataset(args.data_dir, download=True, **{keyword: part}) for part in parts]
    except Exception as error:  # no network, a damaged archive, no SciPy (for SVHN), ...
        fail(f"cannot load {args.dataset} ({error}): if {getattr(dataset, 'filename', '*.mat')} in "
             f"{args.data_dir} is incomplete, delete it; --dataset shapes needs no download")
    x = [torch.from_numpy(part.data) for part in sets]
    x = [part.permute(0, 3, 1, 2).contiguous() for part in x] if cifar else x
    x = [center_crop(resize(part, size), size) for part in x] if size else x
    y = [torch.as_tensor(part.targets if cifar else part.labels).long() for part in sets]
    return *zip(x, y), list(getattr(sets[0], "classes", "0123456789"))


@functools.cache
def list_folder(root, data_dir=""):
    """The images of a folder: train and test as (paths, labels), and the classes' names. It holds
    train/CLASS/* and test/, val/ or validation/, or CLASS/* alone, of which a seventh is tested."""
    root = Path(data_dir, "tiny-imagenet-200") if root == "tiny-imagenet" else Path(root)
    parts = {p.name.lower(): p for p in root.glob("*") if any(map(Path.is_dir, p.glob("*")))}
    split, test = parts.get("train", parts.get("training", root)), []
    train, classes = list_images(split)
    if len(classes) < 2:
        fail(f"{root} does not hold images of several classes in CLASS/* or train/CLASS/*")
    for part in [parts[name] for name in ("valid", "validation", "val", "testing", "test")
                 if name in parts]:  # the last one counts
        found, names = list_images(part)
        if (part / "val_annotations.txt").exists():  # Tiny ImageNet: no folders, a list of labels
            rows = map(str.split, (part / "val_annotations.txt").read_text().splitlines())
            test = [(part / "images" / name, classes.index(label)) for name, label, *_ in rows]
        elif names == classes:
            test = found
        elif set(names) & set(classes):  # else it is unlabelled, as ImageNet's test/
            fail(f"{part} and {split} differ in the classes {sorted(set(names) ^ set(classes))}")
    if not test:
        train.sort(key=lambda p: hashlib.sha1(p[0].relative_to(root).as_posix().encode()).digest())
        test, train = train[:-(-len(train) // 7)], train[-(-len(train) // 7):]
        print(f"{root}: no test images of its classes; {len(test)} are set aside, always the same")
    return tuple(zip(*train)), tuple(zip(*test)), classes


def list_images(root):
    """The images in root/CLASS/, at any depth, as (path, label), and the names of the classes in
    alphabetical order. Hidden files are passed over."""
    files = [path for path in sorted(root.glob("*/**/*")) if path.is_file() and not any(
        part.startswith((".", "__MACOSX")) for part in path.relative_to(root).parts)]
    images = [path for path in files if path.suffix.lower() in IMG_EXTENSIONS]
    if len(images) < len(files):
        print(f"{root}: skipped {len(files) - len(images)} files of types that are not read: "
              f"{', '.join({p.suffix or 'none' for p in files} - {p.suffix for p in images})}")
    names = [path.relative_to(root).parts[0] for path in images]
    classes = sorted(set(names))
    return [(path, classes.index(name)) for path, name in zip(images, names)], classes


def decode(paths, args, size=None):
    """Image files as uint8 N x 3 x H x W, decoded once, by threads, into a file in --data-dir that
    is mapped into memory and so may be larger than it."""
    size = size or args.image_size or min(max(32, min(open_image(paths[0]).size)), 128)
    stamps = [size, *((str(p), os.path.getsize(p), os.path.getmtime(p)) for p in paths)]
    cache = Path(args.data_dir, f"images-{hashlib.sha1(repr(stamps).encode()).hexdigest()}.npy")
    if not cache.exists():
        print(f"decoding {len(paths)} images of {size}x{size} pixels (see --image-size), once")
        temporary = cache.with_suffix(f".{os.getpid()}")  # as another process may decode them, too
        cache.parent.mkdir(parents=True, exist_ok=True)
        head = dict(descr="|u1", fortran_order=False, shape=(len(paths), size, size, 3))
        try:
            with open(temporary, "wb") as file, ThreadPoolExecutor(os.cpu_count()) as pool:
                np.lib.format.write_array_header_1_0(file, head)
                for i in progress(range(0, len(paths), 256), "decoding images, batch"):
                    file.write(np.stack([*pool.map(open_image, paths[i:i + 256], [size] * 256)]))
            cache.exists() or os.replace(temporary, cache)  # Windows replaces no file in use
        finally:
            temporary.unlink(missing_ok=True)
    return torch.from_numpy(np.load(cache, mmap_mode="c")).permute(0, 3, 1, 2)


def open_image(path, size=None):
    """A file's image in RGB, resized: turned as EXIF data say, transparent parts white, 8 bits."""
    try:
        image = ImageOps.exif_transpose(Image.open(path))
        if image.mode[0] in "FI":  # floats, or integers: those of 16 bits are scaled
            if image.mode == "F" or not 255 < (np.uint32(image).max() or 256) < 2**16:
                raise ValueError("its numbers have no known range")
            image = Image.fromarray((np.asarray(image) / 257).astype(np.uint8))
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
        return center_crop(resize(image, size), size) if size else image
    except Exception as error:  # PIL raises nearly anything
        fail(f"{path} cannot be used ({error}): repair or remove it")


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
    """n images of SHAPES, x uint8 n x 3 x size x size, and y. On each lies a faint pattern of its
    class, +-4/255 per pixel, which an attack of 8/255 can turn into that of any other class."""
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(n, dtype=np.int64) % len(SHAPES))
    radius = rng.uniform(0.22, 0.36, (n, 1, 1)) * size
    centre = rng.uniform(0.38, 0.62, (2, n, 1, 1)) * size
    place = np.arange(size) + 0.5
    u, v = (place - centre[0]) / radius, (place[:, None] - centre[1]) / radius
    distance = np.empty((n, size, size))
    for label, outline in enumerate(SHAPES.values()):
        distance[y == label] = outline(u[y == label], v[y == label])
    inside = np.clip(0.5 - distance * radius, 0, 1)[:, None]  # with a smooth edge
    background = rng.uniform(0.05, 0.95, (n, 3, 1, 1))
    contrast = rng.uniform(0.5, 0.8, (n, 3, 1, 1)) * np.where(background < 0.5, 1, -1)
    image = 255 * np.clip(background + contrast * inside, 0.02, 0.98)
    pattern = np.random.default_rng(12345).choice([-4, 4], (len(SHAPES), 3, size, size))
    return torch.from_numpy((image + pattern[y]).round().astype(np.uint8)), torch.from_numpy(y)


# ------------------------------------------------------------------------------------------- models
# The fastest memory format, but on MPS it breaks BatchNorm's gradients (PyTorch issue 175189).
FORMAT = torch.contiguous_format if torch.backends.mps.is_available() else torch.channels_last
ACTIVATIONS = {"relu": functools.partial(nn.ReLU, inplace=True), "softplus": nn.Softplus,
               "softplus10": functools.partial(nn.Softplus, beta=10), "swish": nn.SiLU}
ARCHS = {
    "resnet10": dict(blocks=(1, 1, 1, 1)),
    "resnet18": dict(blocks=(2, 2, 2, 2)),
    "resnet34": dict(blocks=(3, 4, 6, 3)),
    "resnet50": dict(blocks=(3, 4, 6, 3), expansion=4),
    "preactresnet18": dict(blocks=(2, 2, 2, 2), preact="raw"),
    "preactresnet34": dict(blocks=(3, 4, 6, 3), preact="raw"),
    "preactresnet50": dict(blocks=(3, 4, 6, 3), preact="activated", expansion=4),
    "preactresnet18-v2": dict(blocks=(2, 2, 2, 2), preact="activated"),
    **{f"wrn-{depth}-{k}": dict(blocks=[(depth - 4) // 6] * 3, preact="activated", width=16 * k,
                                stem=16) for depth, k in ((16, 8), (28, 10), (34, 4), (34, 10))},
    "vgg16": {},
}


class Block(nn.Module):
    """Residual block with BatchNorm and activation after each convolution (He et al. 2016a) or,
    with `preact`, before: then the shortcut's convolution gets the "raw" or "activated" input."""

    def __init__(self, inputs, width, outputs, stride, activation, preact):
        super().__init__()
        layers = [(inputs, width, 3, stride, 1), (width, outputs, 3, 1, 1)]
        if outputs != width:
            layers = [(inputs, width, 1), (width, width, 3, stride, 1), (width, outputs, 1)]
        for i, layer in enumerate(layers, 1):
            self.add_module(f"conv{i}", nn.Conv2d(*layer, bias=False))
            self.add_module(f"bn{i}", nn.BatchNorm2d(layer[0 if preact else 1]))
        self.shortcut, self.n = nn.Sequential(), len(layers)
        if stride > 1 or inputs != outputs:
            self.shortcut.append(nn.Conv2d(inputs, outputs, 1, stride, bias=False))
            self.shortcut.extend([] if preact else [nn.BatchNorm2d(outputs)])
        self.activation, self.preact = activation, preact

    def forward(self, x):
        out, layers = x, [(getattr(self, f"conv{i}"), getattr(self, f"bn{i}"))
                          for i in range(1, self.n + 1)]
        for i, (conv, bn) in enumerate(layers):
            if self.preact:
                out = self.activation(bn(out))
                x = out if i == 0 and self.preact == "activated" and len(self.shortcut) else x
            out = conv(out) if self.preact else bn(conv(out))
            if not self.preact and i < self.n - 1:
                out = self.activation(out)
        out = out + self.shortcut(x)
        return out if self.preact else self.activation(out)


def resnet(classes, width, activation, size, blocks, stem=None, preact=None, expansion=1):
    """The layers of a CIFAR ResNet, PreActResNet or, with three stages and a narrow stem,
    WideResNet, by the official repositories' names. From 128 pixels on the stem is ImageNet's."""
    channels, stem_form = stem or width, (7, 2, 3) if size >= 128 else (3, 1, 1)
    layers = {"conv1": nn.Conv2d(3, channels, *stem_form, bias=False)}
    layers |= {} if preact else {"bn1": nn.BatchNorm2d(channels), "activation1": activation}
    layers |= {"maxpool": nn.MaxPool2d(3, 2, 1)} if size >= 128 else {}
    for stage, count in enumerate(blocks):
        layers[f"layer{stage + 1}"] = layer = nn.Sequential()
        for i in range(count):
            inputs, channels = channels, width * 2**stage * expansion
            layer.append(Block(inputs, width * 2**stage, channels, 2 if stage and not i else 1,
                               activation, preact))
    layers |= {"bn": nn.BatchNorm2d(channels), "activation": activation} if preact else {}
    return layers | {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(),
                     "linear": nn.Linear(channels, classes)}


def vgg(classes, width, activation, size):
    """The layers of VGG-16 with BatchNorm (Simonyan & Zisserman 2015) and a single linear layer."""
    plan = [n if n == "M" else n * width // 64 for n in torchvision.models.vgg.cfgs["D"]]
    layers = torchvision.models.vgg.make_layers(plan, batch_norm=True)
    layers = [activation if isinstance(layer, nn.ReLU) else layer for layer in layers]
    return {"features": nn.Sequential(*layers), "pool": nn.AdaptiveAvgPool2d(1),
            "flatten": nn.Flatten(), "classifier": nn.Linear(8 * width, classes)}


class Classifier(nn.Sequential):
    """Images N x 3 x H x W in [0, 1] -> logits N x classes in fp32. The input normalisation and the
    precision of training are inside, so that no attack has to know them."""

    def __init__(self, arch, classes, width=None, activation="relu", size=32):
        super().__init__()
        self.options = dict(arch=arch, classes=classes, width=width, activation=activation,
                            size=size)  # of this constructor
        options = dict(width=64) | ARCHS[arch] | (dict(width=width) if width else {})
        layers = (vgg if arch == "vgg16" else resnet)(
            classes, activation=ACTIVATIONS[activation](), size=size, **options)
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.register_buffer("mean", torch.zeros(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.ones(3, 1, 1), persistent=False)
        self.dtype, self.compiled = None, False  # None: fp32
        self.to(memory_format=FORMAT)

    def forward(self, x):
        x = ((x - self.mean) / self.std).contiguous(memory_format=FORMAT)
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype is not None):
            return super().forward(x).to(x.dtype)


def prepare_model(args, data):
    """The untrained model that args ask for; it normalises with the training images' statistics."""
    torch.manual_seed(args.seed)
    x, _, index = data.train
    model = Classifier(args.arch, len(data.classes), args.width, args.activation, min(x.shape[2:]))
    some = x[index[:math.ceil(10_000 * 32**2 / x[0, 0].numel())].to(x.device)].cpu() / 255
    std, mean = torch.std_mean(some, dim=(0, 2, 3), keepdim=True)
    model.mean, model.std = mean[0], std[0].clamp(min=1e-3)
    if args.init_from and not (args.resume and Path(args.out, "last.pt").exists()):
        old, start = load_model(args.init_from)
        layers = [*zip(model, old)][:None if start["classes"] == data.classes else -1]
        if old.options["arch"] != args.arch or any(str(new) != str(old) for new, old in layers):
            fail(f"{args.init_from} holds another network than these options: {old.options}")
        for layer, trained in layers:  # for other classes the last one stays new
            layer.load_state_dict(trained.state_dict())
    model.dtype = dict(bf16=torch.bfloat16, fp16=torch.float16).get(args.precision)
    if args.compile:
        model.compiled = True
        model.compile()
    return model.to(args.device)


# --------------------------------------------------------------------------- attacks and evaluation
@contextlib.contextmanager
def attacking(model, x, bn="eval"):
    """Surrounds every attack on x: the model computes as in evaluation or, with "train", normalises
    by the batch's statistics, and is left as it was. ValueError (CUDA: assert) outside [0, 1]."""
    inside, message = ((x >= -1e-6) & (x <= 1 + 1e-6)).all(), "attacks take images in [0, 1]"
    if x.device.type == "cuda":
        torch._assert_async(inside, message)  # unlike an `if`, this does not make the host wait
    elif not inside:
        raise ValueError(f"{message}: normalise inside the model")
    statistics = ("running_mean", "running_var", "num_batches_tracked", "track_running_stats")
    before = [(module, name, getattr(module, name)) for module in model.modules()
              for name in ("training", *statistics) if hasattr(module, name)]
    if getattr(model, "compiled", False):  # else it would compute the weights' gradients, too
        before += [(weight, "requires_grad", weight.requires_grad) for weight in model.parameters()]
        model.requires_grad_(False)
    model.eval()
    for module in model.modules():
        if bn == "train" and getattr(module, "track_running_stats", False):
            module.train()
            for name in statistics:  # so that the batch's are used, and kept nowhere
                setattr(module, name, None)
    try:  # MATH: the only kind of attention that can be differentiated twice
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


@torch.no_grad()
def project(x_adv, x, eps, norm="linf"):
    """P: projects x_adv onto the eps-ball around x, then onto [0, 1]."""
    delta = x_adv - x
    delta = delta.clamp(-eps, eps) if norm == "linf" else torch.renorm(delta, 2, 0, eps)
    return (x + delta).clamp(0, 1)


@torch.no_grad()
def step(x_adv, gradient, x, eps, alpha, norm="linf"):
    """P(x_adv + alpha d), d being the gradient's sign (linf) or the unit vector along it (l2)."""
    d = gradient.sign() if norm == "linf" else F.normalize(gradient, dim=(1, 2, 3), eps=1e-30)
    return project(x_adv + alpha * d, x, eps, norm)


@torch.no_grad()
def random_start(x, eps, norm="linf", generator=None):
    """A point drawn uniformly from the eps-ball around x, then clipped to [0, 1]."""
    if norm == "linf":
        noise = torch.empty_like(x).uniform_(-1, 1, generator=generator)
    else:
        noise = torch.empty_like(x).normal_(generator=generator)
        radius = torch.empty_like(x[:, :1, :1, :1]).uniform_(generator=generator)
        noise = F.normalize(noise, dim=(1, 2, 3)) * radius ** (1 / x[0].numel())
    return (x + eps * noise).clamp(0, 1)


def pgd_attack(model, x, y, eps, alpha, steps, *, start="uniform", norm="linf", bn="eval",
               loss=F.cross_entropy, generator=None):
    """PGD (Madry et al. 2018): `steps` steps of gradient ascent on the sum of loss(logits, y), from
    a random point or, with start="zero", from x. Returns x_adv, within eps of x and in [0, 1]."""
    x_adv = random_start(x, eps, norm, generator) if start == "uniform" else x
    with attacking(model, x, bn):
        for _ in range(steps):
            x_adv = x_adv.detach().requires_grad_()
            gradient, = torch.autograd.grad(loss(model(x_adv), y, reduction="sum"), x_adv)
            x_adv = step(x_adv, gradient, x, eps, alpha, norm)
    return x_adv.detach()


@contextlib.contextmanager
def exact(model):
    """The copy on which reported numbers are computed: in eval mode, in fp32 and without TF32."""
    memo = {id(value): value.detach() for module in model.modules()  # spectral_norm's weights
            for value in vars(module).values() if torch.is_tensor(value)}
    model = copy.deepcopy(model, memo).eval().requires_grad_(False)
    for network in [module for module in model.modules() if isinstance(module, Classifier)]:
        network.dtype, network.compiled = None, False
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield model


@torch.no_grad()
def still_correct(model, x, y, *attacks, batch_size=None, label="evaluating"):
    """Which images the model still gets right after all attacks(model, x, y) -> x_adv, each of
    which only gets those that withstood the earlier ones: bool N. x uint8, or float in [0, 1]."""
    size = batch_size or (128 if y.is_cpu else 500) * 32**2 // x.shape[2:].numel() or 1
    correct, scale = torch.ones_like(y), 255 if x.dtype == torch.uint8 else 1
    with exact(model) as model:
        for i, attack in enumerate(attacks or [lambda model, x, y: x], 1):
            mine, correct = correct.nonzero()[RANK::WORLD, 0], torch.zeros_like(y)
            for index in progress(mine.split(size) if len(mine) else [], f"{label} {i}, batch"):
                images = x[index.to(x.device)].to(index.device) / scale
                logits = model(attack(model, images, y[index]))
                if not logits.isfinite().all():
                    fail(f"{label}: the network's logits are not finite")
                correct[index] = (logits.argmax(1) == y[index]).long()
            if WORLD > 1:
                dist.all_reduce(correct)
    return correct.bool()


def accuracy(model, x, y, eps, steps=20, norm="linf", batch_size=None):
    """Accuracy in % of a classifier of images in [0, 1], clean and under PGD in steps of eps/4."""
    pgd = functools.partial(pgd_attack, eps=eps, alpha=eps / 4, steps=steps, norm=norm,
                            generator=torch.Generator(y.device).manual_seed(0))
    clean = still_correct(model, x, y, batch_size=batch_size)
    robust = still_correct(model, x[clean.to(x.device)], y[clean], pgd, batch_size=batch_size)
    return tuple(100 * correct.sum().item() / len(y) for correct in (clean, robust))


# ----------------------------------------------------------------------------------------- training
def learning_rate(args, epoch):
    """At a fractional epoch: decay at milestones, a triangle peaking half-way, or a cosine."""
    done = epoch / args.epochs
    return args.lr * {"piecewise": 0.1 ** sum(done >= part for part in args.milestones),
                      "cyclic": 1 - abs(2 * done - 1),
                      "cosine": (1 + math.cos(math.pi * done)) / 2}[args.lr_schedule]


@torch.no_grad()
def average(tensors):
    """Replaces each tensor by its mean over all processes. (DDP does not support autograd.grad.)"""
    tensors = [t for t in tensors if WORLD > 1 and t is not None and t.is_floating_point()]
    if tensors:
        mean = torch.cat([tensor.flatten() for tensor in tensors]) / WORLD
        dist.all_reduce(mean)
        for tensor, part in zip(tensors, mean.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(part.view_as(tensor))  # in the tensor's own memory format


def load(path, device="cpu"):
    """torch.load, of tensors and plain types only, so that no code in the file is executed."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # as others save options
            return torch.load(path, map_location=device, weights_only=True)
    except Exception as e:
        fail(f"cannot load {path}: {e if isinstance(e, OSError) else 'damaged, or no state_dict'}")


def load_model(path, device="cpu"):
    """The network in a checkpoint of these scripts, in eval mode, and the checkpoint, a dict."""
    checkpoint = load(path, device)
    if not isinstance(checkpoint, dict) or "options" not in checkpoint:
        fail(f"{path} is not a checkpoint of these scripts")
    model = Classifier(**checkpoint["options"]).to(device)
    model.load_state_dict(checkpoint["model"])
    model.mean, model.std = checkpoint["mean"], checkpoint["std"]
    return model.eval(), checkpoint


def saved_settings(args):
    """The settings of the run to resume, in --out or the newest one of this method."""
    runs = sorted(Path("runs").glob(f"{args.method}-*/args.json"), key=os.path.getmtime)
    path = Path(args.out, "args.json") if args.out else [Path("runs"), *runs][-1]
    saved = json.loads(path.read_text() or "{}").get("args", {}) if path.is_file() else {}
    if saved.get("method") != args.method:
        fail(f"no run of {args.method}.py to resume in {args.out or 'runs'}: add its --out")
    return saved | dict(out=args.out or str(path.parent), resume=True, device="auto")


def claim_folder(out, name, file):
    """Takes `out`, or the first free one of runs/NAME, runs/NAME-2, ..., by making `file` in it."""
    for i in range(1, sys.maxsize):
        folder = Path(out or f"runs/{name}" + f"-{i}" * (i > 1))
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / file).touch(exist_ok=False)
            return str(folder)
        if out:
            fail(f"{folder} is taken: choose another --out" + " or --resume" * ("args" in file))


class Run:
    """A training run, and its folder: args.json, log.csv, last.pt (from which --resume continues),
    best.pt (of the highest held-out accuracy), and at the end result.json and curves.png."""

    def __init__(self, args, data, model, optimizer, scaler):
        n = len(data.train[2])
        if n < args.batch_size or args.batch_size % WORLD:
            fail(f"--batch-size must be at most {n}, and divisible by the number of processes")
        name = f"{args.method}-{Path(args.dataset).name}-{args.arch}-eps{args.eps * 255:g}"
        folder = [args.out if args.resume or RANK > 0 else
                  claim_folder(args.out, f"{name}-seed{args.seed}", "args.json")]
        if WORLD > 1:
            dist.broadcast_object_list(folder)
        args.out, self.folder, self.args, self.data = folder[0], Path(folder[0]), args, data
        self.epoch, self.rows, self.state, self.saved = 0, [], {}, {}
        fits = max(args.batch_size, 128 * 32**2 // data.test[0][0, 0].numel())  # into memory
        self.accuracy = functools.partial(accuracy, eps=args.eps, norm=args.norm, batch_size=fits)
        self.steps, self.models = n // args.batch_size, {"": model}  # networks by their file prefix
        if args.resume and (self.folder / "last.pt").exists():
            last = load(self.folder / "last.pt", args.device)
            self.epoch, self.rows, self.saved = (last[key] for key in ("epoch", "rows", "state"))
            if last["classes"] != data.classes or args.epochs < self.epoch:
                fail(f"{self.folder} was started with other classes, or has had more epochs")
        for part in dict(model=model, optimizer=optimizer, scaler=scaler).items():
            self.keep(*part)
        self.about = dict(command=sys.argv, args=vars(args), versions=dict(
            python=platform.python_version(), torch=torch.__version__, numpy=np.__version__,
            device=torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()))
        if RANK == 0:
            (self.folder / "args.json").write_text(json.dumps(self.about, indent=1))
        signal.signal(signal.SIGINT, lambda *_: fail("interrupted; to go on, repeat with --resume"))
        counts = f"{n:,} training, {len(data.val[1]):,} held-out, {len(data.test[1]):,} test images"
        classes = ", ".join([*data.classes[:20], "..."][:len(data.classes)])
        print(f"{args.method}: {args.arch}, {sum(p.numel() for p in model.parameters()):,} weights,"
              f" {args.precision} on {args.device}, {args.norm} eps {args.eps * 255:g}/255\n"
              f"{Path(args.dataset).name}: {counts} of {data.test[0].shape[-1]} pixels; classes: "
              f"{classes}\n{args.epochs} epochs of {self.steps} steps with {args.batch_size} images"
              f" (defaults: {args.preset}), see {self.folder}/args.json")
        self.head = ("\n             mean      accuracy on held-out images %   training\n"
                     "epoch    lr  loss      clean    under PGD (10 steps)   seconds\n")

    def keep(self, name, part):
        """Makes a part of the training that has a state_dict survive an interruption."""
        self.state[name] = part
        if name in self.saved:
            part.load_state_dict(self.saved[name])
        return part

    def start_epoch(self):
        # Noise of its own for each process and epoch, so that a resumed run draws the same.
        torch.manual_seed(self.args.seed + 1_000_003 * (1 + RANK + WORLD * self.epoch))
        self.state["model"].train()
        self.started = time.time()

    def end_epoch(self, lr, loss):
        """Evaluates on the held-out images, logs and saves. `loss`: the epoch's mean, a tensor."""
        average([loss] + [b for model in self.models.values() for b in model.buffers()])
        if not math.isfinite(loss):  # which also waits for the GPU to finish
            fail(f"the loss is {loss.item()}: try a lower --lr, or --precision fp32")
        self.epoch += 1
        row = dict(epoch=self.epoch, lr=lr, loss=loss.item(), seconds=time.time() - self.started)
        for prefix, model in self.models.items():
            clean, pgd = self.accuracy(model, *self.data.val, steps=10)
            row |= {f"{prefix}val_clean": clean, f"{prefix}val_pgd": pgd}
            print(f"{self.head}{self.epoch:5}{lr:7.4f} {loss:5.3f}{clean:11.1f}{pgd:24.1f}"
                  f"{row['seconds']:10.1f}  {prefix.strip('_')}", flush=True)
            self.head = ""
        if [row, *self.rows][-1]["val_pgd"] - row["val_pgd"] > max(20, 2e3 / len(self.data.val[1])):
            print("warning: accuracy under PGD fell by over 20 points: catastrophic overfitting?")
        self.rows.append(row)
        state = {name: part.state_dict() for name, part in self.state.items()}
        for prefix, model in reversed(self.models.items()):  # last.pt, which resumes, comes last
            checkpoint = dict(model=model.state_dict(), mean=model.mean, std=model.std,
                              options=model.options, args=vars(self.args), epoch=self.epoch,
                              classes=self.data.classes, rows=self.rows)
            # Without an attack no epoch is robust, and the clean accuracy counts.
            key = prefix + ("val_clean" if vars(self.args).get("steps") == 0 else "val_pgd")
            if row[key] == max(old.get(key, 0) for old in self.rows):
                self.save(f"{prefix}best.pt", checkpoint)
            if self.args.keep_epochs:
                self.save(f"{prefix}epoch-{self.epoch}.pt", checkpoint)
            self.save(f"{prefix}last.pt", checkpoint | dict(state=state))
        with contextlib.suppress(PermissionError):  # a spreadsheet may have locked it
            with open(os.devnull if RANK else self.folder / "log.csv", "w", newline="") as file:
                csv.writer(file).writerows([row, *([r.get(k) for k in row] for r in self.rows)])

    def save(self, name, content):
        if RANK == 0:  # replaces a file as a whole, so that it is complete at any time
            torch.save(content, self.folder / "tmp")
            os.replace(self.folder / "tmp", self.folder / name)

    def finish(self):
        if WORLD > 1:
            dist.barrier()  # until the first process has saved them
        result = dict(n_test=len(self.data.test[1]), train_seconds=sum(
            row["seconds"] for row in self.rows))
        print(f"\n{result['n_test']:,} test images  epoch  clean %  under PGD (20 steps) %")
        for prefix in self.models:
            for name in (f"{prefix}best", f"{prefix}last"):
                model, checkpoint = load_model(self.folder / f"{name}.pt", self.args.device)
                row, same = checkpoint["rows"][-1], result.get(f"{prefix}best", {})
                if row["epoch"] != same.get("epoch"):
                    clean, pgd = self.accuracy(model, *self.data.test, steps=20)
                result[name] = dict(epoch=row["epoch"], val_clean=row[f"{prefix}val_clean"],
                                    val_pgd=row[f"{prefix}val_pgd"], test_clean=clean, test_pgd=pgd)
                print(f"{name:17}  {row['epoch']:5}{clean:9.2f}{pgd:24.2f}")
                if clean <= 120 / len(self.data.classes):
                    print(f"warning: {name}.pt is hardly better than chance")
            print(f"difference{same['test_clean'] - clean:23.2f}{same['test_pgd'] - pgd:24.2f}")
        if RANK == 0:
            (self.folder / "result.json").write_text(json.dumps(result, indent=1))
            try:
                self.draw_curves()
            except Exception as error:  # whatever matplotlib's settings lead to: the rest is safe
                print(f"warning: curves.png could not be drawn: {error}")
        print(f"checkpoints, log and curves are in {self.folder}", flush=True)

    def draw_curves(self):
        from matplotlib.figure import Figure  # takes half a second
        figure = Figure(figsize=(8, 3.5), dpi=150, layout="constrained")
        left, right = figure.subplots(1, 2)
        for key in [key for key in self.rows[-1] if "loss" in key or "val_" in key]:
            line = [(row["epoch"], row[key]) for row in self.rows if key in row]
            (left if key == "loss" else right).plot(*zip(*line), label=key.replace("_", " "))
        left.set(xlabel="epoch", ylabel="training loss")
        right.set(xlabel="epoch", ylabel="held-out accuracy (%)", ylim=(0, 100))
        right.legend()
        figure.savefig(self.folder / "curves.png")
