"""Checkpoints, and the bookkeeping of a training: its folder, log, resuming and test at the end."""

import contextlib
import json
import math
import os
import platform
import shlex
import sys
import textwrap
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torchvision

from common import (RANK, WORLD, UserError, accuracy, average, pgd_attack, progress, say,
                    statistics, still_right)
from models import build_model, canonical, uncompiled


# ----------------------------------------------------------------------------------- checkpoints

def save(content, path):
    """Text, or tensors and plain types, to a temporary file that takes its place at `path` once it
    is on the disk; process 0 alone does so. UserError if it cannot."""
    if RANK:
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content.encode()) if isinstance(content, str) else torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save's own
        if not isinstance(cause, OSError):
            raise
        with contextlib.suppress(OSError):
            temporary.unlink()  # it may be what fills the disk
        disk = next(str(p) for p in path.absolute().parents if os.path.ismount(p))
        raise UserError(f"cannot write {path}: {cause.strerror} (disk {disk}); what was there is "
                        "whole: mend that, and go on (a training with --resume)") from None


def load(path, device="cpu"):
    """Tensors and plain types from a file, of which nothing is ever executed. UserError for a file
    that is damaged, holds anything else, or would unpack to more than its own size."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                if sum(part.file_size for part in file.infolist()) > path.stat().st_size:
                    raise ValueError("packed, which torch.save never does")
                if damaged := file.testzip():  # torch.load would not notice
                    raise ValueError(f"{damaged} is damaged")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        detail = " ".join(str(error).split())[:80]
        reason = f"is no checkpoint, or is cut short or damaged ({detail})"
        if "Weights only load failed" in str(error):
            reason = "holds Python objects, which could execute code: save a state_dict() alone"
        with contextlib.suppress(OSError), open(path, "rb") as file:
            if file.read(200).lstrip().startswith(b"<"):
                reason = "is a web page: download the file itself"
    raise UserError(f"{path} {reason}")


KINDS = dict(arch=str, width=int | None, activation=str, dataset=str, data_dir=str, eps=float,
             image_size=int | None, norm=str, classes=list, epoch=int, rows=list, mean=list,
             std=list)  # of what a checkpoint holds


def load_model(path, device, arch=None, width=None, activation=None, data=None, mean=None,
               std=None):
    """The network in a checkpoint of these scripts, and the settings it was trained with as a dict.

    A state dict from elsewhere needs `arch`, and `data` for its classes; its settings only tell the
    "normalisation". That is `mean` and `std` where given, else what it holds itself; else what
    gets more of 500 training pictures right: none, or the data's statistics. UserError where the
    weights do not fit.
    """
    state = load(path, device)
    ours = isinstance(state, dict) and "args" in state
    if not ours and not (arch and data):
        raise UserError(f"{path} does not say what it is: name its --arch and --dataset")
    try:
        weights, settings, choices = (unpack(state) if ours else
                                      unpack_foreign(state, arch, data, mean, std))
        stem = weights["conv1.weight"].shape[-1] if "conv1.weight" in weights else 3
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        what = "no sound checkpoint" if ours else "no state dict, or another architecture"
        raise UserError(f"{path} holds {what}") from None
    best = -1
    for name, normalisation in choices.items():
        form = (arch or settings["arch"], len(settings["classes"]),
                width or settings.get("width"), activation or settings.get("activation", "relu"),
                *normalisation, 224 if stem == 7 else 32)
        try:
            with torch.device("meta"):  # the shapes alone: a false width must not fill the memory
                build_model(*form).load_state_dict(weights, assign=True)
            candidate = build_model(*form)
            candidate.load_state_dict(weights)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            detail = str(error).splitlines()[-1].strip()
            raise UserError(f"{path} holds another architecture ({detail})") from None
        candidate.to(device).compute_in(torch.float32)
        right = 0 if ours or len(choices) == 1 else still_right(
            candidate, *(part[:500] for part in data.train)).sum().item()
        if right > best:
            best, model, settings["normalisation"] = right, candidate, name
    return model, settings


def unpack(state):
    """Of a checkpoint of these scripts: weights, settings, and mean and std by name. KeyError,
    TypeError or ValueError where somebody has tampered with it."""
    settings = {"width": None, "image_size": None} | state["args"]
    settings |= {key: state[key] for key in ("classes", "epoch", "rows", "mean", "std")}
    for key, kind in KINDS.items():
        if not isinstance(settings[key], kind):
            raise TypeError(key)
    mean, std, rows = settings.pop("mean"), settings.pop("std"), settings["rows"]
    numbers = [*mean, *std, *(row[key] for row in rows for key in (
        "lr", "loss", "seconds", "val_clean", "val_pgd"))]
    words = [settings["dataset"], settings["data_dir"], *settings["classes"]]
    if not (all(isinstance(number, float) for number in numbers) and "\0" not in "".join(words)
            and settings["classes"] and len(mean) == len(std) == 3 and 0 < settings["eps"] <= 1
            and settings["norm"] in ("linf", "l2") and len(rows) == settings["epoch"]
            and (settings["image_size"] is None or 32 <= settings["image_size"] <= 4096)):
        raise ValueError
    return state["model"], settings, {"of the run": (mean, std)}


def unpack_foreign(state, arch, data, mean, std):
    """The same of a state dict from elsewhere, for each normalisation that it may have."""
    inside = [key for key in ("state_dict", "model_state_dict", "model", "net")
              if isinstance(state.get(key), dict)]
    weights, *held = canonical(state[inside[0]] if inside else state, arch)
    choices = {"none": ((0.0,) * 3, (1.0,) * 3), "of the data": statistics(data)}
    if all(held):
        choices = {"of the checkpoint": held}
    if mean and std:
        choices = {"as given": (mean, std)}
    return weights, dict(classes=data.classes), choices


def check_classes(path, settings, data):
    """UserError where a checkpoint knows another number of classes than the data set has."""
    n = len(settings.get("classes", data.classes))
    if n != len(data.classes):
        raise UserError(f"{path} tells {n} classes apart, the data set has {len(data.classes)}: "
                        "name the right --dataset")


# ---------------------------------------------------------------------------------- a run's folder

def claim_folder(args):
    """The folder of a new run, --out or the next free runs/NAME; with --resume, of an old one."""
    name = f"{args.method}-{Path(args.dataset).name}-{args.arch}"
    name += f"-eps{args.eps * 255:g}-seed{args.seed}"
    folders = [Path("runs", name + f"-{i}" * (i > 1)) for i in range(1, 1000)]
    folders = [Path(args.out)] if args.out else folders
    held = [folder for folder in folders if (folder / "args.json").exists()]
    unfinished = [folder for folder in held if not (folder / "result.json").exists()]
    if args.resume:
        if not held:
            raise UserError(f"{folders[0]} holds no run to resume: leave out --resume")
        folder, differ = (unfinished or held)[-1], []
        try:
            before = dict(json.loads((folder / "args.json").read_text())["args"])
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{folder}/args.json is damaged: begin anew, with another --out"
                            ) from None
        for key, value in vars(args).items():
            free = key in ("out", "resume", "data_dir", "device", "stream", "on_bad_file")
            if not free and before.get(key) != value:
                differ.append(f"--{key.replace('_', '-')} was {before.get(key)}, is {value}")
        if differ:
            raise UserError(f"{folder} was begun with other settings: {'; '.join(differ)}")
        return folder
    if args.out and held:
        raise UserError(f"{args.out} holds a run, and no run is ever overwritten: take another "
                        "--out, or add --resume to go on with it")
    if unfinished:
        say(f"{unfinished[-1]} is unfinished; --resume goes on with it")
    return next(folder for folder in folders if folder not in held)


def generators(device):
    """The modules of torch whose random generators a training draws from."""
    return [torch] if device == "cpu" else [torch, torch.get_device_module(device)]


class Run:
    """One training in its folder: args.json, log.csv, last.pt and best.pt after every epoch, and
    result.json and curves.png at the end. With --resume it starts from last.pt.

    `models` are the networks that it evaluates and saves, by the prefix of their files: the one
    that is trained, and any that a method keeps `beside` it.
    """

    def __init__(self, args, data, model, optimizer, scaler):
        sizes, (n, _, height, width) = [f"{len(y):,}" for _, y in data[:3]], data.train[0].shape
        if n < args.batch_size:
            raise UserError(f"--batch-size {args.batch_size} exceeds the {n} training pictures")
        folder = [claim_folder(args) if RANK == 0 else None]
        if WORLD > 1:
            dist.broadcast_object_list(folder)
        self.args, self.folder, self.epoch, self.rows = args, folder[0], 0, []
        self.pictures, self.models = data, {"": model}
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.steps, args.out, self.random = n // args.batch_size, str(self.folder), None
        if args.resume and (self.folder / "last.pt").exists():
            try:
                self.go_on_from(load(self.folder / "last.pt", args.device))
            except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
                raise UserError(f"{self.folder}/last.pt is damaged: begin anew, with another --out"
                                ) from None
        cuda = args.device.startswith("cuda")
        self.about = dict(command=shlex.join(sys.argv), args=vars(args), versions=dict(
            python=platform.python_version(), torch=torch.__version__, numpy=np.__version__,
            torchvision=torchvision.__version__, threads=torch.get_num_threads(),
            device=torch.cuda.get_device_name(args.device) if cuda else platform.machine()))
        if not self.epoch:
            save(json.dumps(self.about, indent=1), self.folder / "args.json")
        say(textwrap.fill(" ".join(f"{key}={value}" for key, value in vars(args).items()), 100,
                          break_long_words=False, break_on_hyphens=False))
        say(f"{sizes[0]} training, {sizes[1]} held-out, {sizes[2]} test pictures of "
            f"{width}x{height} in {len(data.classes)} classes; "
            f"{sum(p.numel() for p in model.parameters()):,} parameters")
        say(f"{self.folder}, from epoch {self.epoch + 1}")
        self.header = "epoch      lr    loss  val clean %  val PGD-10 %  seconds"
        self.progress = progress("step", args.epochs * self.steps, self.epoch * self.steps)

    def go_on_from(self, state):
        _, settings, _ = unpack(state)
        self.epoch, self.rows, self.random = settings["epoch"], settings["rows"], state["random"]
        if not all(map(str.isidentifier, state["beside"])):
            raise ValueError("a prefix that would lead out of the folder")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for weight, held in self.optimizer.state.items():  # fused SGD needs the same format
            held["momentum_buffer"] = torch.empty_like(weight).copy_(held["momentum_buffer"])
        self.scaler.load_state_dict(state["scaler"])
        for prefix, weights in state["beside"].items():
            self.beside(prefix).load_state_dict(weights)
        self.restore_generators()  # already, because states that do not fit raise

    def restore_generators(self):
        for module, state in zip(generators(self.args.device), self.random[RANK]):
            module.set_rng_state(state.cpu())

    def beside(self, prefix):
        """The network kept under `prefix`; at first a copy of the one that is trained."""
        if prefix not in self.models:
            self.models[prefix] = uncompiled(self.model)
        return self.models[prefix]

    def now(self):
        torch.get_device_module(self.args.device).synchronize()
        return time.perf_counter()

    def start_epoch(self):
        if self.header:  # the first of this process: each of torchrun's draws noise of its own
            torch.manual_seed(self.args.seed + 1_000_003 * (RANK + 1))
            if self.random:
                self.restore_generators()
            say(self.header)
        self.header = None
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
        average([loss, *(buffer for model in self.models.values() for buffer in model.buffers()
                         if buffer.is_floating_point())])
        if not math.isfinite(loss):
            raise UserError(f"the loss of epoch {self.epoch + 1} is {loss.item()}; {self.folder} "
                            f"keeps epoch {self.epoch}: try a lower --lr, or --precision fp32")
        self.epoch += 1
        before = [row["val_pgd"] for row in self.rows]
        row = dict(epoch=self.epoch, lr=lr, loss=loss.item(), seconds=seconds)
        self.rows.append(row)
        for prefix, model in self.models.items():
            clean, pgd = accuracy(model, *self.pictures.val, self.pgd(10))
            row |= {f"{prefix}val_clean": clean, f"{prefix}val_pgd": pgd}
        random = [module.get_rng_state() for module in generators(self.args.device)]
        self.random = [random] * WORLD
        if WORLD > 1:
            dist.all_gather_object(self.random, random)
        self.save_checkpoints()
        for prefix in self.models:
            clean, pgd = row[f"{prefix}val_clean"], row[f"{prefix}val_pgd"]
            say(f"{self.epoch:5}  {lr:6.4f}  {loss:6.3f}  {clean:11.1f}  {pgd:12.1f}  "
                f"{seconds:7.1f}  {prefix.strip('_')}".rstrip())
        if before and row["val_pgd"] < before[-1] - 20:
            say("warning: PGD accuracy fell by more than 20 points, perhaps by catastrophic "
                "overfitting: try a smaller --alpha or more attack steps; best.pt is from before")

    def save_checkpoints(self):
        lines = [self.rows[-1], *([row.get(key, "") for key in self.rows[-1]] for row in self.rows)]
        save("".join(",".join(map(str, line)) + "\n" for line in lines), self.folder / "log.csv")
        mean, std = self.model.mean.flatten().tolist(), self.model.std.flatten().tolist()
        for prefix, model in reversed(self.models.items()):  # last.pt, which resumes, comes last
            state = dict(model=model.state_dict(), mean=mean, std=std, args=vars(self.args),
                         classes=self.pictures.classes, epoch=self.epoch, rows=self.rows)
            robust = [row.get(f"{prefix}val_pgd", 0) for row in self.rows]
            if robust[-1] == max(robust):  # of equals the later one
                save(state, self.folder / f"{prefix}best.pt")
            if self.args.keep_epochs:
                save(state, self.folder / f"{prefix}epoch-{self.epoch}.pt")
            if not prefix:
                state |= dict(optimizer=self.optimizer.state_dict(),
                              scaler=self.scaler.state_dict(), random=self.random,
                              beside={p: m.state_dict() for p, m in self.models.items() if p})
            save(state, self.folder / f"{prefix}last.pt")

    def finish(self):
        """Tests best and last of each network: prints both and their difference, writes
        result.json."""
        if WORLD > 1:
            dist.barrier()  # until process 0 has written the checkpoints
        scores, (x, y) = {}, self.pictures.test
        say("\n               epoch  val clean %  val PGD-10 %  test clean %  test PGD-20 %")
        for prefix, model in self.models.items():
            for name in (f"{prefix}best", f"{prefix}last"):
                state = load(self.folder / f"{name}.pt", self.args.device)
                row = state["rows"][-1]
                if name.endswith("best") or row["epoch"] != score["epoch"]:  # else the same weights
                    model.load_state_dict(state["model"])
                    show = progress(f"testing {name}.pt: picture", len(y))
                    clean, pgd = accuracy(model, x, y, self.pgd(20), show=show)
                score = dict(epoch=row["epoch"], val_clean=row[f"{prefix}val_clean"],
                             val_pgd=row[f"{prefix}val_pgd"], test_clean=clean, test_pgd=pgd)
                scores[name] = score
            best = scores[f"{prefix}best"]
            scores[f"{prefix}difference"] = {key: best[key] - score[key] for key in best}
            for name in (f"{prefix}best", f"{prefix}last", f"{prefix}difference"):
                epoch, *shares = scores[name].values()
                say(f"{name:14} {epoch:5}  {'  '.join(f'{share:12.2f}' for share in shares)}")
        say(f"{len(y):,} test pictures; PGD: 1 restart, step eps/4; held-out PGD-10 chose best.pt")
        result = self.about | scores | dict(n_test=len(y), train_seconds=sum(
            row["seconds"] for row in self.rows))
        if RANK == 0:
            draw_curves([(f"{self.folder.name} {prefix}".strip(" _"), self.rows, prefix)
                         for prefix in self.models]).savefig(self.folder / "curves.png", dpi=100)
        save(json.dumps(result, indent=1), self.folder / "result.json")  # says: this is finished
        say(f"{self.folder} holds " + " ".join(sorted(file.name for file in self.folder.iterdir())))
        if WORLD > 1:
            dist.barrier()


# Okabe and Ito's, which the colour-blind can tell apart.
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"]


def draw_curves(logs):
    """A figure of several trainings: loss and held-out accuracy against the epoch, and accuracy
    under attack against the seconds of training. logs: (name, rows, prefix of the network)."""
    from matplotlib.figure import Figure  # half a second to import
    figure = Figure(figsize=(13, 4.8), layout="constrained")
    loss, accuracies, by_time = figure.subplots(1, 3)
    for colour, (name, rows, prefix) in zip(COLOURS * len(logs), logs):
        seconds = np.cumsum([row["seconds"] for row in rows])
        kept = [i for i, row in enumerate(rows) if f"{prefix}val_pgd" in row]
        epochs, losses, clean, pgd = ([rows[i][key] for i in kept] for key in (
            "epoch", "loss", f"{prefix}val_clean", f"{prefix}val_pgd"))
        style = dict(color=colour, marker="o" * (len(kept) < 30), markersize=4)
        loss.plot(epochs, losses, "-", **style, label=name)
        accuracies.plot(epochs, clean, ":", **style)
        accuracies.plot(epochs, pgd, "-", **style)
        by_time.plot(seconds[kept], pgd, "-", **style)
    loss.set(xlabel="epoch", ylabel="training loss")
    accuracies.set(xlabel="epoch", ylabel="held-out accuracy (%)", ylim=(0, 102),
                   title="PGD-10 (solid), clean (dotted)")
    by_time.set(xlabel="training time (s)", ylabel="held-out accuracy (%)", ylim=(0, 102),
                title="PGD-10")
    for axes in (loss, accuracies, by_time):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside lower center", ncols=4)
    return figure
