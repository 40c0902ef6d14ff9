"""Evaluates checkpoints: accuracy under attack, signs of gradient masking, and plots.

    python evaluate.py runs/*/best.pt                              clean, PGD-50-10, AutoAttack-lite
    python evaluate.py runs/.../best.pt --attack lite square --n-examples 200
    python evaluate.py runs/.../best.pt --checklist --surrogate runs/.../best.pt
    python evaluate.py runs/a/best.pt runs/b/best.pt --attack none --plots
    python evaluate.py weights.pth --arch resnet18 --dataset cifar10     a state dict from elsewhere

Prints a table with a row for each checkpoint, and one more, mean +- standard deviation, for runs
that differ only in the seed. result.json and the plots are saved in a folder of their own. All is
computed in fp32 on n test images. An attack only gets the images that are classified correctly
without it, and each restart those that the earlier ones have left. Every accuracy under attack is
an upper bound on the true one. eps, step sizes and distances are in units of 1/255.
"""

import argparse
import copy
import functools
import itertools
import json
import math
import re
import statistics
import sys
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

import common
from backward_smoothing import backward_smoothing
from fast_at import misalignment

ATTACKS = ["pgd", "margin", "lite", "square", "cw", "rays"]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(usage="%(prog)s CKPT ... [options]", description=__doc__,
                                     formatter_class=common.HelpFormatter)
    parser.error = common.fail  # one line, without the list of all options
    add, number, count = parser.add_argument, common.number, common.number(int, 1)
    add("checkpoints", nargs="+", metavar="CKPT", help="best.pt, last.pt or a state dict")
    add("--attack", nargs="+", default=["pgd", "lite"], choices=[*ATTACKS, "none"], metavar="NAME",
        help="pgd: PGD on cross-entropy; margin: PGD on the margin of Carlini & Wagner; lite: "
        "AutoAttack-lite; square, rays: without gradients; cw: Carlini & Wagner's L2 attack; none")
    add("--surrogate", nargs="+", default=[], metavar="CKPT", help="also transfer PGD from these")
    add("--checklist", action="store_true", help="look for signs of gradient masking")
    add("--plots", nargs="*", choices=list(PLOTS), metavar="NAME",
        help="all plots, or some of " + ", ".join(PLOTS))
    add("--markdown", action="store_true", help="print the table as Markdown")
    add("--save-images", type=count, metavar="N", help="save N images, clean and under PGD, in "
        "images.pt, and draw the sheet")
    add("--steps", type=count, default=50, help="of PGD")
    add("--restarts", type=count, default=10, help="of PGD")
    add("--alpha", type=common.over_255, help="step size of PGD, in units of 1/255; None: eps/4")
    add("--start", choices=["uniform", "zero"], default="uniform",
        help="of PGD: random points, or once the image itself")
    add("--apgd-steps", type=count, default=100, help="of each attack in AutoAttack-lite")
    add("--queries", type=count, default=5000, help="of Square and RayS, per image")
    add("--eps", type=common.over_255, help="in units of 1/255; None: as in training, else 8")
    add("--norm", choices=["linf", "l2"], help="None: as in training, else linf")
    add("--n-examples", type=count, help="number of test images, chosen at random; None: all")
    add("--n-plot", type=count, default=100, help="number of these for the plots")
    add("--batch-size", type=count, help="None: smaller for larger images")
    add("--arch", choices=common.ARCHS, metavar="NAME", help="of a state dict from elsewhere")
    add("--width", type=count, help="of that architecture; None: the usual one")
    add("--activation", choices=common.ACTIVATIONS, default="relu", help="of that architecture")
    add("--mean", type=number(float, 0), nargs=3, help="of its normalisation, for images in [0, 1]")
    add("--std", type=number(float, 1e-6), nargs=3, help="None: what the state dict holds, if any")
    add("--dataset", help="None: as in training")
    add("--data-dir", metavar="DIR", help="None: as in training, else data")
    add("--image-size", type=number(int, 32, 4096), help="None: as in training")
    add("--seed", type=number(int, 0), default=0, help="of the choice of images and the noise")
    add("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"], help="to compute on")
    add("--out", metavar="DIR", help="result folder; None: the next free runs/evaluation-N")
    args = parser.parse_args(argv)
    if (args.mean is None) != (args.std is None):
        parser.error("--mean and --std go together")
    if max([*(args.mean or []), *(args.std or [])], default=0) > 1.5:
        parser.error("--mean and --std are those of images in [0, 1]: divide by 255")
    if args.checklist:
        args.attack = [*args.attack, "pgd", "lite", "square"]
    args.restarts = 1 if args.start == "zero" else args.restarts
    args.plots = list(PLOTS) if args.plots == [] else args.plots or []
    args.plots += ["sheet"] if args.save_images and "sheet" not in args.plots else []
    args.device = common.set_up(args.device)
    return args


# ------------------------------------------------------------------------------------- checkpoints

class Checkpoint(NamedTuple):
    """A model, and the test images x uint8 N x 3 x H x W and labels y that it is evaluated on."""
    path: str
    model: torch.nn.Module
    about: dict  # dataset, arch, normalisation; of our own also args, epoch, rows
    classes: list
    x: torch.Tensor
    y: torch.Tensor
    eps: float  # for images in [0, 1]
    norm: str

    @property
    def name(self):
        """Its folder and file, in short lines for plots; $ would begin a formula there."""
        name = "/".join(Path(self.path).with_suffix("").parts[-2:])
        return "\n".join(textwrap.wrap(name, 26)).replace("$", r"\$")

    def choose(self, n, seed):
        """The same with n of its images, chosen at random."""
        order = torch.randperm(len(self.y), generator=torch.Generator().manual_seed(seed))
        index = order[:n].to(self.y.device)
        return self._replace(x=common.take(self.x, index), y=self.y[index])

    def batches(self, args, index=None):
        """Its images with these indices, in parts that are small enough for gradients: the indices,
        x float in [0, 1], y."""
        index = torch.arange(len(self.y), device=self.y.device) if index is None else index
        size = args.batch_size or max(1, 64 * 32**2 // self.x[0, 0].numel())
        for part in common.progress(index.split(size), f"{self.path}, batch") if len(index) else ():
            yield part, common.take(self.x, part).float() / 255, self.y[part]


@functools.cache
def test_images(dataset, data_dir, image_size, device):
    """A data set's test images x uint8, labels y and class names. The training images of a folder
    are neither needed nor decoded."""
    args = argparse.Namespace(dataset=dataset, data_dir=data_dir, image_size=image_size, val_size=1,
                              train_size=None, test_size=None, label_noise=0, no_flip=True,
                              device=device)
    if dataset == "shapes" or dataset in common.ARCHIVES:
        data = common.load_data(args)
        return *data.test, data.classes
    tiny = Path(data_dir, "tiny-imagenet-200")
    _, test, classes = common.list_folder(tiny if dataset == "tiny-imagenet" else dataset)
    paths, labels = zip(*test)
    return common.decode(paths, args), torch.tensor(labels, device=device), classes


def load_checkpoint(path, args):
    """Loads a network, and the test images of its data set."""
    content = common.load(path, args.device)
    ours = isinstance(content, dict) and "options" in content
    if not ours and not (args.arch and args.dataset):
        common.fail(f"{path} is not a checkpoint of these scripts: add --arch and --dataset")
    trained = content["args"] if ours else dict(norm="linf", eps=8 / 255, data_dir="data",
                                                image_size=None)
    dataset = common.find_dataset(args.dataset or trained["dataset"])
    data_dir = trained["data_dir"] if Path(trained["data_dir"]).is_dir() else "data"
    size = args.image_size or trained["image_size"]
    if ours and dataset not in common.DATASETS:
        size = size or content["options"]["size"]
    x, y, classes = test_images(dataset, args.data_dir or data_dir, size, args.device)
    content = content if ours else convert_foreign(content, path, args, classes)
    model = common.Classifier(**content["options"]).to(args.device).eval()
    if hasattr(model, "bn") and "bn.weight" not in content["model"]:
        # RobustBench's PreActResNets without a final BatchNorm have no activation there, either.
        model.bn = model.activation = torch.nn.Identity()
    common.load_weights(model, content["model"], path)
    model.mean, model.std = content["mean"], content["std"]
    match_classes(model, content["classes"], classes, path)
    norm, eps = args.norm or trained["norm"], trained["eps"] if args.eps is None else args.eps
    if args.eps is None and norm != trained["norm"]:
        common.fail(f"{path} was not trained for the norm {norm}: add --eps")
    about = {"normalisation": "of the run"} | content | dict(dataset=Path(dataset).name,
                                                             arch=content["options"]["arch"])
    checkpoint = Checkpoint(path, model, about, classes, x, y, eps, norm)
    return checkpoint.choose(args.n_examples, args.seed) if args.n_examples else checkpoint


def match_classes(model, known, classes, path):
    """Puts the outputs of a model, which stand for the `known` classes, in the order of the data
    set's classes. Warns if their names differ."""
    if len(known) != len(classes):
        common.fail(f"{path} knows {len(known)} classes, and the data set has {len(classes)}")
    if known != classes and sorted(known) == sorted(classes):
        order, last = [known.index(name) for name in classes], list(model.children())[-1]
        last.weight.data, last.bias.data = last.weight.data[order], last.bias.data[order]
        print(f"{path}: the data set has the same classes in another order: matched by name")
    elif known != classes:
        here, there = next((a, b) for a, b in zip(known, classes) if a != b)
        print(f"warning: {path} knows other classes than the data set: {here} instead of {there}")


def tensors_in(content, place=""):
    """All tensors in nested dicts, by the keys that lead to them, joined by dots."""
    if torch.is_tensor(content):
        return {place: content}
    parts = content.items() if isinstance(content, dict) else ()
    return {name: tensor for key, part in parts
            for name, tensor in tensors_in(part, f"{place}.{key}".strip(".")).items()}


def convert_foreign(content, path, args, classes):
    """A checkpoint of another repository in the form of ours. Parameters are matched by name, and
    the normalisation is what it holds: nothing is guessed."""
    tensors = {name: tensor for name, tensor in tensors_in(content).items()
               if not re.search(r"(^|\.)(attacker|sub_block1|model_preact)", name)}  # are copies
    first = re.compile(r"(.*\.|)(conv1|features\.0)\.weight")  # one in a network is for RGB images
    prefixes = [first.fullmatch(name)[1] for name, tensor in tensors.items()
                if first.fullmatch(name) and tensor.shape[1] == 3]
    best = [prefix for prefix in prefixes if "best" in prefix.split(".")] or prefixes
    if len(best) != 1:
        common.fail(f"{path} holds several networks, {', '.join(prefixes)}: save one alone" if best
                    else f"{path} does not fit the network: conv1.weight is missing")
    if len(prefixes) > 1:
        print(f"{path} holds the networks {', '.join(prefixes)}: taking {best[0]}")
    weights, held, place = {}, {}, best[0].split(".")[0] if len(prefixes) > 1 else ""
    for name, tensor in tensors.items():
        last = name.split(".")[-1].removeprefix("new_")
        if last in ("mean", "mu", "std", "sigma") and name.startswith(place) and tensor.numel() == 3:
            held["mean" if last in ("mean", "mu") else "std"] = tensor.flatten().tolist()
        elif name.startswith(best[0]):  # to the names of CIFAR ResNets from those of TRADES' ...
            name = re.sub(r"^block(\d)\.layer\.", r"layer\1.", name.removeprefix(best[0]))
            name = re.sub(r"^fc\.", "linear.", name.replace("convShortcut", "shortcut.0"))
            name = re.sub(r"^bn1\.", "bn.", name) if "preact" in common.ARCHS[args.arch] else name
            name = name.replace("downsample", "shortcut")  # ... and torchvision's
            weights[name] = tensor.float() if tensor.is_floating_point() else tensor
    for name in [name for name in weights if name.endswith(".running_var")]:  # in old files
        weights.setdefault(name.replace("running_var", "num_batches_tracked"), torch.tensor(0))
    mean, std, normalisation = [0.0] * 3, [1.0] * 3, "none"
    if args.mean:
        mean, std, normalisation = args.mean, args.std, "as given"
    elif len(held) == 2:
        mean, std, normalisation = held["mean"], held["std"], "of the checkpoint"
    mean, std = torch.tensor([mean, std], device=args.device).view(2, 3, 1, 1)
    large = "conv1.weight" in weights and weights["conv1.weight"].shape[-1] == 7  # ImageNet's stem
    return dict(model=weights, mean=mean, std=std, normalisation=normalisation, classes=classes,
                options=dict(arch=args.arch, classes=len(classes), width=args.width,
                             activation=args.activation, size=224 if large else 32))


# ----------------------------------------------------------------------------------- more attacks

def margin(logits, y, reduction="none"):
    """The margin of Carlini & Wagner, N: the highest wrong logit minus the true one."""
    true = F.one_hot(y, logits.shape[1]).bool()
    difference = logits.masked_fill(true, -math.inf).amax(1) - logits[true]
    return difference.sum() if reduction == "sum" else difference


def eta(size):
    """The square that Square adds in L2: one half rises to its centre, the other falls; norm 1."""
    ring = (1 / torch.arange(1, size + 1) ** 2).flip(0).cumsum(0).flip(0)
    halves, columns = [], torch.arange(size)[None]
    for rows in (size // 2, size - size // 2):
        away = (torch.arange(rows)[:, None] - rows // 2).abs().maximum((columns - size // 2).abs())
        halves.append(ring[away] / ring[away].norm())
    return torch.cat([halves[0], -halves[1]]) / 2 ** 0.5


def square(model, x, y, eps, *, norm="linf", queries=5000, generator=None):
    """Square attack (Andriushchenko et al. 2020): adds random squares, and keeps those that help.
    Returns x_adv. The batch shares the places of the squares; each image draws its own signs."""
    def uniform(*size):
        return torch.rand(size, device=x.device, generator=generator)

    def sign(*size):
        return torch.where(uniform(len(x), x.shape[1], *size) < 0.5, -1.0, 1.0)

    def place(size):
        row, column = (int(uniform(1) * (whole - size + 1)) for whole in x.shape[2:])
        return (slice(None), slice(None), slice(row, row + size), slice(column, column + size))

    def energy(delta):
        return delta.square().sum((2, 3), keepdim=True)  # of each channel

    def on_sphere(delta):
        return delta * eps / common.l2_norm(delta).clamp(min=1e-12)

    x_adv, index, side = x.clone(), torch.arange(len(x), device=x.device), min(x.shape[2:])
    with common.attacking(model, x), torch.no_grad():
        if norm == "linf":
            delta = eps * sign(1, x.shape[3])  # stripes
        else:
            tile = max(side // 5, 3)
            tiles = [whole // tile for whole in x.shape[2:]]
            signs = sign(*tiles).repeat_interleave(tile, 2).repeat_interleave(tile, 3)
            delta = torch.zeros_like(x)
            delta[:, :, :signs.shape[2], :signs.shape[3]] = eta(tile).to(x).repeat(tiles) * signs
            delta = on_sphere(delta)
        point = (x + delta).clamp(0, 1)
        best = margin(model(point), y)
        for query in range(1, queries):
            x_adv[index] = point
            index, x, y, point, best = (t[best <= 0] for t in (index, x, y, point, best))
            if not len(index):  # all are fooled
                break
            # A square covers 0.8 of the image, and half as much after certain parts of the way.
            halvings = sum(query / queries > part / 10_000
                           for part in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))
            size = round((0.8 * 0.5 ** halvings * x.shape[2] * x.shape[3]) ** 0.5)
            delta = point - x
            if norm == "linf":
                delta[place(min(max(size, 1), side - 1))] = eps * sign(1, 1)
            else:  # moves the perturbation of one square into another, with what clipping has spared
                size = min(max(size, 3) | 1, side - 1)
                window, other = place(size), place(size)
                old, before = delta[window].clone(), energy(delta)
                spare = (eps ** 2 - before.sum(1, keepdim=True)).clamp(min=0) / x.shape[1]
                delta[window] = delta[other] = 0
                pattern = eta(size).to(x.device)
                new = (pattern if uniform(1) < 0.5 else pattern.T) * sign(1, 1)
                new = new + old / energy(old).sqrt().clamp(min=1e-12)
                new = new / energy(new).sqrt().clamp(min=1e-12)
                delta[window] = new * (spare + before - energy(delta)).clamp(min=0).sqrt()
                delta = on_sphere(delta)
            new = (x + delta).clamp(0, 1)
            value = margin(model(new), y)
            point = torch.where((value > best).view(-1, 1, 1, 1), new, point)
            best = value.maximum(best)
        x_adv[index] = point
    return x_adv


def cw_l2(model, x, y, *, constant=0.1, steps=100, lr=0.01):
    """Carlini & Wagner's L2 attack with KD-SWA's settings, which leave out the search for the
    constant: minimises |x_adv - x|^2 + constant max(z_y - z_other, 0), however far that leads.
    Returns the closest x_adv that fooled the model, or x."""
    w = torch.atanh((2 * x - 1) * 0.999999).requires_grad_()  # x_adv = (tanh(w) + 1) / 2
    optimizer = torch.optim.Adam([w], lr)
    x_adv, nearest = x.clone(), torch.full_like(x[:, :1, :1, :1], math.inf)
    with common.attacking(model, x):
        for _ in range(steps):
            point = (w.tanh() + 1) / 2
            ahead, distance = margin(model(point), y), common.l2_norm(point - x).detach()
            closer = (ahead > 0).view_as(distance) & (distance < nearest)
            nearest = torch.where(closer, distance, nearest)
            x_adv = torch.where(closer, point.detach(), x_adv)
            loss = (point - x).square().sum() + constant * (-ahead).clamp(min=0).sum()
            w.grad, = torch.autograd.grad(loss, w)
            optimizer.step()
    return x_adv


def rays(model, x, y, *, queries=5000):
    """RayS (Chen & Gu 2020), which only sees predicted labels: searches for the sign vector along
    which the decision boundary is closest, by flipping ever smaller blocks of signs. Returns points
    just behind the boundary, however far away, and x itself where none was found."""
    def is_fooled(index, signs, radius):
        point = x[index] + radius.view(-1, 1, 1, 1) * signs.view(-1, *x.shape[1:])
        return model(point.clamp(0, 1)).argmax(1) != y[index]

    n, size = len(x), x[0].numel()
    signs, radius = x.new_ones(n, size), x.new_full((n,), math.inf)
    used, level, block = torch.zeros(n, device=x.device), 0, 0
    with common.attacking(model, x), torch.no_grad():
        while len(index := (used < queries).nonzero()[:, 0]):
            width = max(1, math.ceil(size / 2 ** level))
            trial = signs.clone()
            trial[:, block * width:(block + 1) * width] *= -1
            used[index] += 1
            index = search = index[is_fooled(index, trial[index], radius[index])]
            low, high = torch.zeros_like(radius), radius.clamp(max=1)
            while len(search):  # bisects each image to 1e-3 in L2, as the authors' code does
                middle = (low[search] + high[search]) / 2
                behind = is_fooled(search, trial[search], middle)
                used[search] += 1
                high[search[behind]], low[search[~behind]] = middle[behind], middle[~behind]
                search = search[high[search] - low[search] > 1e-3 / size ** 0.5]
            index = index[high[index] < radius[index]]
            radius[index], signs[index] = high[index], trial[index]
            block += 1
            if block * width >= size:
                level, block = level + 1, 0
    radius = radius.view(-1, 1, 1, 1)
    return torch.where(radius < math.inf, x + radius * signs.view_as(x), x).clamp(0, 1)


# -------------------------------------------------------------------------------------- the table

def noise(args, restart=0):
    return torch.Generator(args.device).manual_seed(args.seed + restart)


def attacks(checkpoint, args, surrogates):
    """The attacks within eps that args ask for: name -> (column, list of attack(model, x, y) ->
    x_adv). Each has noise of its own, so that it does not matter which others there are."""
    def pgd(restarts=args.restarts, loss=F.cross_entropy):
        return [partial(common.pgd_attack, eps=eps, alpha=alpha, steps=args.steps, start=args.start,
                        norm=norm, loss=loss, generator=noise(args, i)) for i in range(restarts)]

    def transfer(model, x, y, surrogate, attack):
        with common.exact(surrogate.model) as source:
            return attack(source, x, y)

    partial, eps, norm = functools.partial, checkpoint.eps, checkpoint.norm
    alpha, title = eps / 4 if args.alpha is None else args.alpha, f"PGD-{args.steps}-{args.restarts}"
    named = {"pgd": (title, pgd()),
             "margin": (f"margin-{title}", pgd(loss=margin)),
             "lite": ("AA-lite", [partial(common.autoattack_lite, eps=eps, norm=norm,
                                          steps=args.apgd_steps, generator=noise(args))]),
             "square": (f"Square-{args.queries}", [partial(
                 square, eps=eps, norm=norm, queries=args.queries, generator=noise(args))])}
    return {name: named[name] for name in named if name in args.attack} | {
        f"transfer {i}": (f"transfer {i}", [partial(transfer, surrogate=surrogate, attack=pgd(1)[0])])
        for i, surrogate in enumerate(surrogates, 1)}


def percent(mask):
    return 100 * mask.sum().item() / len(mask)


def withstand(checkpoint, args, attacks, label):
    """Which images are classified correctly without an attack and after each attack, bool N."""
    return common.still_correct(checkpoint.model, checkpoint.x, checkpoint.y, lambda model, x, y: x,
                                *attacks, batch_size=args.batch_size,
                                label=f"{checkpoint.path}, {label}")


def distance_to_fool(checkpoint, args, attack, order, correct):
    """How far an attack without eps moves each image to fool the model, in a norm of this order, N:
    0 where it is not `correct` without an attack, infinity where the attack fails."""
    distance = torch.zeros(len(correct), device=correct.device)
    with common.exact(checkpoint.model) as model:
        mine = correct.nonzero()[common.RANK::common.WORLD, 0]
        for index, x, y in checkpoint.batches(args, mine):
            x_adv = attack(model, x, y)
            with torch.no_grad():
                fooled = model(x_adv).argmax(1) != y
            moved = (x_adv - x).flatten(1).norm(order, dim=1)
            distance[index] = moved.masked_fill(~fooled, math.inf)
    if common.WORLD > 1:
        dist.all_reduce(distance)
    return distance


def inspect(checkpoint, args):
    """Two percentages: of the input gradient, what is exactly 0, so that attacks cannot follow it;
    and of the images, those that get the most frequent prediction."""
    zeros, predicted = 0, 0
    with common.exact(checkpoint.model) as model:
        for _, x, y in checkpoint.batches(args):
            logits = model(x.requires_grad_())
            gradient, = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), x)
            if not gradient.isfinite().all():
                common.fail(f"{checkpoint.path}: the input gradients are not finite")
            zeros += (~(gradient.abs() > 0)).float().mean((1, 2, 3)).sum().item()
            predicted += logits.argmax(1).bincount(minlength=logits.shape[1])
    return 100 * zeros / len(checkpoint.y), 100 * predicted.max().item() / len(checkpoint.y)


def evaluate(checkpoint, args, surrogates):
    """A row of the table, a dict, and by attack which images withstand it within eps, bool N."""
    def mean(distance):  # None where nothing was fooled
        distance = distance[distance < math.inf]
        return 255 * distance.mean().item() if len(distance) else None

    start, about = time.perf_counter(), checkpoint.about
    kept = {"clean": (correct := withstand(checkpoint, args, [], "clean"))}
    zeros, most_frequent = inspect(checkpoint, args)
    row = {name: about[name] for name in ("dataset", "arch", "normalisation")}
    row = {"checkpoint": checkpoint.path} | row | {"n": len(checkpoint.y), "eps": checkpoint.eps * 255,
                                                   "norm": checkpoint.norm, "clean %": percent(correct)}
    for name, (column, parts) in attacks(checkpoint, args, surrogates).items():
        kept[name] = withstand(checkpoint, args, parts, column)
        row[f"{column} %"] = percent(kept[name])
    if "cw" in args.attack:
        distance = distance_to_fool(checkpoint, args, cw_l2, 2, correct)
        row |= {"CW-L2 %": percent(distance == math.inf), "CW-L2 distance": mean(distance[correct])}
    if "rays" in args.attack:
        attack = functools.partial(rays, queries=args.queries)
        distance = distance_to_fool(checkpoint, args, attack, math.inf, correct)
        row["ADBD"] = mean(distance)
        if checkpoint.norm == "linf":
            kept["rays"] = distance > checkpoint.eps
            row[f"RayS-{args.queries} %"] = percent(kept["rays"])
    if len(kept) > 2:
        row["worst case %"] = percent(worst_case(kept))
    row |= {"zero gradients %": zeros, "seconds": time.perf_counter() - start}
    warn(checkpoint, row, most_frequent)
    return row, kept


def worst_case(kept):
    return torch.stack(list(kept.values())).all(0)


def warn(checkpoint, row, most_frequent):
    """Prints what makes the figures of a row doubtful."""
    start, classes, clean = f"warning: {checkpoint.path}:", len(checkpoint.classes), row["clean %"]
    balanced = checkpoint.y.bincount().max() <= 1.5 * len(checkpoint.y) / classes
    if "args" not in checkpoint.about and clean < min(200 / classes, 75):
        print(f"{start} only {clean:.1f} % are right. The usual causes: the normalisation (--mean, "
              "--std), the order of the classes, the variant of the blocks (--arch preactresnet18 or "
              "preactresnet18-v2)")
    elif clean <= 120 / classes or balanced and most_frequent >= 95:
        print(f"{start} {clean:.1f} % are right, {100 / classes:.1f} % by chance; "
              f"{most_frequent:.0f} % of the images get the same prediction")
    if row["zero gradients %"] > 1:
        print(f"{start} {row['zero gradients %']:.1f} % of the input gradients are exactly 0: "
              "gradient-based attacks may fail because of that")
    if classes < 4 and "AA-lite %" in row:
        print(f"{start} DLR needs 4 classes, so AA-lite used cross-entropy")


def same_but_seed(checkpoints):
    """The indices of the checkpoints, in lists of those that differ in nothing but the seed."""
    groups, free = {}, ("seed", "out", "data_dir", "device", "resume", "keep_epochs", "processes")
    for i, checkpoint in enumerate(checkpoints):
        settings = checkpoint.about.get("args", dict(path=checkpoint.path))
        key = [re.sub(r"seed\d+", "", f"{name} {value}")  # as in the path of a teacher
               for name, value in sorted(settings.items()) if name not in free]
        groups.setdefault((Path(checkpoint.path).name, *key), []).append(i)
    return list(groups.values())


def summarise(checkpoints, rows):
    """A row for each group of runs that differ in nothing but the seed: each number is a dict of
    its mean and its sample standard deviation."""
    summary = []
    for few in [[rows[i] for i in group] for group in same_but_seed(checkpoints) if len(group) > 1]:
        name = re.sub(r"-?seed\d+", "", few[0]["checkpoint"]) + f" ({len(few)} seeds)"
        summary.append(few[0] | dict(checkpoint=name))
        for name in [name for name, value in few[0].items() if isinstance(value, float | None)]:
            values = [row[name] for row in few]
            if name != "eps":
                summary[-1][name] = None if None in values else dict(
                    mean=statistics.mean(values), std=statistics.stdev(values))
    return summary


def table(rows, markdown=False):
    """Rows, dicts, as aligned text or as Markdown; what a row lacks is left empty."""
    def text(value):
        if isinstance(value, dict):
            return f"{value['mean']:.2f} +- {value['std']:.2f}"
        return f"{value:.2f}" if isinstance(value, float) else "" if value is None else str(value)

    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names] + [[text(row.get(name)) for name in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    if markdown:
        cells.insert(1, ["-" * width for width in widths])
    lines = [(" | " if markdown else "  ").join(map(str.rjust, line, widths)) for line in cells]
    return "\n".join(f"| {line} |" if markdown else line for line in lines)


# -------------------------------------------------------------------------------- gradient masking

def under_pgd(checkpoint, args, eps, alpha, steps):
    """Which images withstand one restart of PGD, bool N."""
    attack = functools.partial(common.pgd_attack, eps=eps, alpha=alpha, steps=steps,
                               norm=checkpoint.norm, generator=noise(args))
    return withstand(checkpoint, args, [attack], f"PGD-{steps}")


def checklist(checkpoint, args, row, kept):
    """Signs that gradients are masked (Athalye et al. 2018; Carlini et al. 2019): a list of
    (verdict, what should hold, the figures behind it)."""
    found, eps, mask = [], checkpoint.eps, True
    white_box = worst_case({name: kept[name] for name in ("pgd", "margin", "lite") if name in kept})
    transfers = [name for name in kept if name.startswith("transfer")]
    for kind, names in (("gradient-free", ["square", "rays"]), ("transfer", transfers)):
        claim = f"{kind} attacks are weaker than white-box attacks"
        for name in [name for name in names if name in kept]:
            share, best, alone = map(percent, (kept[name], white_box, white_box & ~kept[name]))
            found.append((alone <= 1 and share >= best, claim, f"{name}: {share:.1f} % against "
                          f"{best:.1f} %; it alone fools {alone:.1f} %"))
        if not names:
            found.append((None, claim, "not checked: no --surrogate"))
    largest = 0.5 * (checkpoint.x[0].numel() ** 0.5 if checkpoint.norm == "l2" else 1)
    radii = [eps, 2 * eps, 4 * eps, 8 * eps, largest]
    shares = [percent(mask := mask & under_pgd(checkpoint, args, radius, radius / 4, 20))
              for radius in radii]
    found.append((shares[-1] <= 1, "accuracy falls to 0 as eps grows", ", ".join(
        f"{share:.1f} % at {radius * 255:.0f}" for share, radius in zip(shares, radii))))
    one, ten, hundred = (percent(under_pgd(checkpoint, args, eps, alpha, steps))
                         for steps, alpha in ((1, eps), (10, eps / 4), (100, eps / 4)))
    found.append((one >= ten - 1 and ten >= hundred - 1, "more attack steps do not help the network",
                  f"{one:.1f} % after 1, {ten:.1f} % after 10, {hundred:.1f} % after 100"))
    found.append((row["zero gradients %"] <= 1, "input gradients are not 0",
                  f"{row['zero gradients %']:.1f} % of them are exactly 0"))
    with common.exact(checkpoint.model) as model, torch.no_grad():
        _, x, _ = next(checkpoint.batches(args))
        found.append((torch.equal(model(x), model(x)), "the network is not random",
                      "logits of the same images, computed twice"))
    return [({True: "pass", False: "WARN", None: "----"}[holds], *rest) for holds, *rest in found]


# ------------------------------------------------------------------------------------------- plots

def new_figure(rows, columns, width, height):
    import matplotlib.figure  # takes half a second
    matplotlib.rcParams.update({"font.size": 14, "axes.grid": True, "grid.alpha": 0.3,
                                "lines.linewidth": 2.5})
    figure = matplotlib.figure.Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def draw_lines(panels, xlabel, ylabel, span=(), **options):
    """panels: title -> name of a line -> (xs, ys). The names stand beside the ends of the lines. The
    vertical axes include `span`."""
    figure, (row,) = new_figure(1, len(panels), 4.5 * len(panels) + 3, 5)
    for axes, (title, lines) in zip(row, panels.items()):
        axes.set(title=title, xlabel=xlabel, ylabel=ylabel, **options)
        for colour, (xs, ys) in zip(itertools.cycle(common.COLOURS), lines.values()):
            axes.plot(xs, ys, "o-", color=colour)
            axes.update_datalim([(xs[0], edge) for edge in span])
        axes.autoscale_view()
        ends = [axes.transLimits.transform(axes.transScale.transform((xs[-1], ys[-1])))[1]
                for xs, ys in lines.values()]
        lowest = -1
        for end, colour, name in sorted(zip(ends, itertools.cycle(common.COLOURS), lines)):
            lowest = max(end, lowest + 0.07 * (1 + name.count("\n")))  # not onto each other
            axes.annotate(name, (1.02, lowest), xycoords="axes fraction", color=colour, va="center")
    return figure


def along_training(checkpoints, args, measure, ylabel, **options):
    """A panel for each of the numbers that `measure` gives; the checkpoints of a run, averaged or
    not, make a line over its epochs."""
    values, panels = [], {}
    for checkpoint in checkpoints:
        with common.exact(checkpoint.model) as model:
            parts = [measure(model, x, y, checkpoint.eps, checkpoint.norm)
                     for _, x, y in checkpoint.batches(args)]
        values.append({name: torch.cat([part[name] for part in parts]).mean().item()
                       for name in parts[0]})
        path, epoch = Path(checkpoint.path), checkpoint.about.get("epoch", 0)
        run = path.parent.name + " (average)" * path.name.startswith("swa_")
        for name, value in values[-1].items():
            lines = panels.setdefault(name, {})
            lines.setdefault(run if epoch else checkpoint.name, []).append((epoch, value))
    return draw_lines({name: {run: tuple(zip(*sorted(points))) for run, points in lines.items()}
                       for name, lines in panels.items()}, "epoch", ylabel, **options), values


def largest_eigenvalue(model, x, y, iterations=20):
    """The eigenvalue of the largest magnitude, N, of the Hessian of cross-entropy with respect to
    each image, by power iteration. It can be negative."""
    x = x.detach().requires_grad_()
    loss = F.cross_entropy(model(x), y, reduction="sum")
    gradient, = torch.autograd.grad(loss, x, create_graph=True)
    v = torch.randn_like(x)
    for _ in range(iterations):
        v = v / common.l2_norm(v).clamp(min=1e-30)
        product, = torch.autograd.grad(gradient, x, v, retain_graph=True)
        value, v = (v * product).flatten(1).sum(1), product
    return value.detach()


def curvature(model, x, y, eps, norm):
    """Backward Smoothing's Figure 3: the curvature of the loss at the images and near them, N."""
    points = {"clean": x, "random": common.random_start(x, eps, norm),
              "backward-smoothed": backward_smoothing(model, x, eps, eps, alone=True, norm=norm)}
    return {name: largest_eigenvalue(model, point, y) for name, point in points.items()}


def alignment(model, x, y, eps, norm):
    """KD-SWA's Figure A11 and Fast-BAT's Figure 2: do the gradients at an image and near it agree?"""
    return {"gradient alignment": 1 - misalignment(model, x, y, eps, norm, "eval").expand(len(x))}


@torch.no_grad()
def plot_landscape(checkpoints, args):
    """KD-SWA's Figure 6: the loss of an image along the gradient's sign and along random signs."""
    figure, (row,) = new_figure(1, len(checkpoints), 4.6 * len(checkpoints) + 1, 4.6)
    ticks, levels, values = torch.linspace(-2, 2, 41), torch.logspace(-4, 2, 25), []
    for axes, checkpoint in zip(row, checkpoints):
        (_, x, y), = checkpoint.choose(1, args.seed).batches(args)
        with common.exact(checkpoint.model) as model, torch.enable_grad():
            loss = F.cross_entropy(model(x.requires_grad_()), y)
            along = torch.autograd.grad(loss, x)[0].sign() * checkpoint.eps
        across = torch.randn_like(along).sign() * checkpoint.eps
        surface = torch.stack([F.cross_entropy(model(x + a * along + b * across), y)
                               for b in ticks for a in ticks]).view(41, 41).cpu()
        values.append({"highest loss": surface.max().item()})
        drawn = axes.contourf(ticks, ticks, surface.clamp(levels[0] * 1.01, levels[-1]), levels,
                              norm="log", cmap="cividis")
        axes.set(xlabel="gradient sign (eps)", ylabel="random signs (eps)", title=checkpoint.name)
    figure.colorbar(drawn, ax=row, label="loss", ticks=levels[::4])
    return figure, values


def plot_eps(checkpoints, args):
    """Accuracy under PGD-20 against eps."""
    values = []
    for checkpoint in checkpoints:
        mask, eps = True, checkpoint.eps or 8 / 255
        values.append({f"{255 * radius:g}": percent(
            mask := mask & under_pgd(checkpoint, args, radius, radius / 4, 20))
            for radius in [eps * factor for factor in (0, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4)]})
    lines = {checkpoint.name: (list(map(float, shares)), list(shares.values()))
             for checkpoint, shares in zip(checkpoints, values)}
    return draw_lines({"": lines}, "eps (1/255)", "accuracy under PGD-20 (%)", (0, 100)), values


def attacked(checkpoint, args, steps):
    """x, y, x_adv under PGD, logits and logits_adv of all its images."""
    generator, parts = noise(args), []
    with common.exact(checkpoint.model) as model:
        for _, x, y in checkpoint.batches(args):
            x_adv = common.pgd_attack(model, x, y, checkpoint.eps, checkpoint.eps / 4, steps,
                                      norm=checkpoint.norm, generator=generator)
            with torch.no_grad():
                parts.append((x, y, x_adv, model(x), model(x_adv)))
    return map(torch.cat, zip(*parts))


def plot_weights(checkpoints, args):
    """KD-SWA's Figure 7: the loss under PGD-10 when the weights move in 10 random directions."""
    values, distances = [], (0, 10, 20, 30, 40, 50)
    for checkpoint in checkpoints:
        losses, model = dict.fromkeys(distances, 0), copy.deepcopy(checkpoint.model)
        trained = torch.cat([weight.flatten() for weight in model.parameters()]).detach()
        for _ in range(10):
            direction = torch.randn_like(trained)
            direction *= trained.norm() / direction.norm()
            for distance in distances:
                torch.nn.utils.vector_to_parameters(trained + distance / 100 * direction,
                                                    model.parameters())
                _, y, *_, logits = attacked(checkpoint._replace(model=model), args, 10)
                losses[distance] += F.cross_entropy(logits, y).item() / 10
        values.append({f"{distance} %": loss for distance, loss in losses.items()})
    lines = {checkpoint.name: (distances, list(losses.values()))
             for checkpoint, losses in zip(checkpoints, values)}
    return draw_lines({"": lines}, "distance from the trained weights (% of their norm)",
                      "loss under PGD-10", yscale="log"), values


def plot_logits(checkpoints, args):
    """KD-SWA's Figure 5: logits of three classes, clean and under PGD-20, in the plane in which the
    clean ones vary most."""
    figure, (row,) = new_figure(1, len(checkpoints), 4.8 * len(checkpoints), 5.2)
    values = []
    for axes, checkpoint in zip(row, checkpoints):
        _, y, _, clean, moved = attacked(checkpoint, args, 20)
        _, spread, directions = torch.linalg.svd(clean - clean.mean(0), full_matrices=False)
        for colour, c in zip(common.COLOURS, y.unique()[:3].tolist()):
            for logits, marker, word in ((clean, "o", ""), (moved, "*", ", attacked")):
                points = (logits[y == c] - clean.mean(0)) @ directions[:2].T
                axes.scatter(*points.T.cpu(), marker=marker, s=45, color=colour, alpha=0.6,
                             label=checkpoint.classes[c] + word)
        axes.set(xlabel="first principal axis", ylabel="second", title=checkpoint.name)
        share = spread[:2].square().sum() / spread.square().sum()
        values.append({"variance in the plane %": 100 * share.item()})
    figure.legend(*row[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure, values


def plot_sheet(checkpoints, args):
    """An image of each class: clean, the perturbation (scaled) and their sum, and what the network
    takes them for. "fooled" is the share of those that were right before."""
    n, columns = len(checkpoints), min(10, max(len(c.classes) for c in checkpoints))
    figure, rows = new_figure(3 * n, columns, 1.25 * columns + 1, 4.4 * n)
    values = []
    for checkpoint, lines in zip(checkpoints, rows.reshape(n, 3, columns)):
        index = torch.stack([(checkpoint.y == c).nonzero()[0, 0] for c in checkpoint.y.unique()[:10]])
        few = checkpoint._replace(x=common.take(checkpoint.x, index), y=checkpoint.y[index])
        x, y, x_adv, *logits = attacked(few, args, 20)
        before, after = (part.argmax(1) for part in logits)
        shown = 0.5 + (x_adv - x) / (x_adv - x).abs().amax().clamp(min=1e-9) / 2
        for line, word, images, guesses in zip(lines, ("clean", "perturbation", "attacked"),
                                               (x, shown, x_adv), (before, None, after)):
            line[0].set_ylabel(word, fontsize=11)
            for i, axes in enumerate(line):
                axes.set(xticks=[], yticks=[])
                if i < len(y):
                    axes.imshow(images[i].permute(1, 2, 0).cpu().numpy())
                if i < len(y) and guesses is not None:
                    axes.set_title(checkpoint.classes[guesses[i]][:11], fontsize=11,
                                   color=common.COLOURS[int(guesses[i] != y[i])])
        lines[1, columns // 2].set_title(checkpoint.name.replace("\n", ""), fontsize=12)
        correct = before == y
        values.append({"fooled %": percent((after != y)[correct]) if correct.any() else 0.0})
    return figure, values


def plot_curves(checkpoints, args):
    """The log of each run, up to its checkpoint; runs that differ only in the seed are one line."""
    logs, runs = [checkpoint.about.get("rows") for checkpoint in checkpoints], []
    if None in logs:
        raise ValueError(f"{checkpoints[logs.index(None)].path} holds no log")
    for group in same_but_seed(checkpoints):
        name, prefix = checkpoints[group[0]].name, "swa_" * Path(checkpoints[group[0]].path).name.startswith("swa_")
        name = name if len(group) == 1 else re.sub(r"-?seed\d+", "", name)
        runs.append((name, [logs[i] for i in group], prefix))
    values = [{"best held-out PGD-10 %": max(row["val_pgd"] for row in log),
               "last": log[-1]["val_pgd"]} for log in logs]
    return common.draw_curves(runs), values


PLOTS = {
    "curvature": functools.partial(along_training, measure=curvature, yscale="symlog",
                                   ylabel="largest Hessian eigenvalue"),
    "alignment": functools.partial(along_training, measure=alignment, ylabel="cosine", span=(0, 1)),
    "landscape": plot_landscape, "eps": plot_eps, "weights": plot_weights, "logits": plot_logits,
    "sheet": plot_sheet, "curves": plot_curves}


def claim_folder(out):
    """--out, or the first of runs/evaluation-1, ... that nobody has, even if two ask at once."""
    for i in itertools.count(1):
        folder = Path(out or f"runs/evaluation-{i}")
        try:
            folder.mkdir(parents=True, exist_ok=bool(out))
            return folder
        except FileExistsError:
            pass


def main(args):
    if args.out and Path(args.out, "result.json").exists():
        common.fail(f"{args.out} holds a result: choose another --out")
    checkpoints = [load_checkpoint(path, args) for path in args.checkpoints]
    surrogates = [load_checkpoint(path, args) for path in args.surrogate]
    for surrogate in surrogates:
        if any(surrogate.classes != checkpoint.classes for checkpoint in checkpoints):
            common.fail(f"{surrogate.path} cannot be a surrogate: it knows other classes")
    folder = claim_folder(args.out) if common.RANK == 0 else None
    settings = vars(args) | {name: 255 * vars(args)[name] for name in ("eps", "alpha") if vars(args)[name]}
    result = dict(command=sys.argv, args=settings, rows=[], classes=[], checklist=[], summary=[], plots={})

    def save():
        if folder:
            (folder / "result.json").write_text(json.dumps(result, indent=1))

    for checkpoint in checkpoints:
        row, kept = evaluate(checkpoint, args, surrogates)
        result["rows"].append(row)
        result["classes"].append(...)
