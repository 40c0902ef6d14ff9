"""What happens to real runs, done to ours on purpose; prints figures, exits with 1 if one is bad.

    python tests/faults.py kills            each script killed 20 times, and resumed
    python tests/faults.py worker           one of two processes killed
    python tests/faults.py disk             a disk that is full while a checkpoint is written
    python tests/faults.py files            200 malformed checkpoints and data caches
    python tests/faults.py words            200 malformed command lines
    python tests/faults.py stream           20,000 pictures from disk
    python tests/faults.py endurance        500 epochs
    python tests/faults.py processes        two processes against one: losses and time (`losses` is
                                            what each of them does)

Not collected by pytest; test_faults.py does a little of each.
"""

import argparse
import contextlib
import hashlib
import io
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zipfile
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import backward_smoothing  # noqa: E402
import bookkeeping  # noqa: E402
import common  # noqa: E402
import evaluate  # noqa: E402
import fast_at  # noqa: E402
import fast_bat  # noqa: E402
import kd_swa  # noqa: E402
import trades  # noqa: E402

SCRIPTS = {module.__name__: module for module in (
    fast_at, trades, backward_smoothing, fast_bat, kd_swa)}
TINY = "--dataset shapes --arch resnet10 --width 8 --batch-size 16 --val-size 20".split()
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def make_folder(root, train=8, test=4, size=32, suffix="png", seed=0):
    """A folder of pictures in 2 classes, `train` and `test` of each."""
    from PIL import Image
    rng = np.random.default_rng(seed)
    for part, n in (("train", train), ("test", test)):
        for name in ("cat", "dog"):
            (root / part / name).mkdir(parents=True)
            for i in range(n):
                picture = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
                picture.resize((size, size)).save(root / part / name / f"{i}.{suffix}")
    return root


# ------------------------------------------------------------------------------------------- kills

# Runs a script that tells where it is when it gets SIGUSR1, just before it is killed.
WATCHED = """
import faulthandler, runpy, signal, sys
faulthandler.register(signal.SIGUSR1, all_threads=False, chain=False)
sys.argv = sys.argv[1:]
sys.path.insert(0, str(__import__("pathlib").Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
"""
PHASES = {"save": "writing", "load": "reading", "finish": "final test", "accuracy": "evaluation",
          "train_teacher": "a teacher", "training_loss": "a step", "batches": "a step",
          "train": "a step"}


def start(script, *options, cwd):
    return subprocess.Popen([sys.executable, "-c", WATCHED, ROOT / f"{script}.py",
                             *map(str, options)], cwd=cwd, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env=os.environ | {"PYTHONUNBUFFERED": "1"})


def kill(process):
    """SIGKILL; returns the phase that it was in."""
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.002)
    process.kill()
    functions = re.findall(r" in (\w+)$", process.communicate()[1], re.M)
    return next((PHASES[name] for name in functions if name in PHASES), "starting up")


def kill_and_resume(script, kills, folder, options=(), seed=0):
    """Runs a script whole, and another time with `kills` kills; returns in which phases they came,
    and whether the networks that it leaves are bitwise equal."""
    rng = random.Random(seed)
    options = [*TINY, "--train-size", 320, "--epochs", 6, *options, "--out"]
    whole = start(script, *options, "whole", cwd=folder)
    began = time.perf_counter()
    _, err = whole.communicate()
    length = time.perf_counter() - began
    assert whole.returncode == 0, err
    phases = []
    while len(phases) < kills:
        again = ["--resume"] if (folder / "run/args.json").exists() else []
        process, began = start(script, *options, "run", *again, cwd=folder), time.perf_counter()
        if len(phases) % 4 == 1:  # wait for a checkpoint that is being written
            while process.poll() is None and not list(folder.glob("run/**/*.tmp")):
                time.sleep(0.0002)
        else:  # anywhere, but rather after the imports
            wait = rng.uniform(0.3, 1) * length
            while process.poll() is None and time.perf_counter() - began < wait:
                time.sleep(0.001)
        if process.poll() is not None:  # it was faster: so begin anew
            assert process.returncode == 0, process.communicate()
            if not equal(weights(folder / "run/last.pt"), weights(folder / "whole/last.pt")):
                return phases, False
            shutil.rmtree(folder / "run")
        else:
            phases.append(kill(process))
        for left in folder.glob("run/**/*.tmp"):  # so that the next one is seen
            left.unlink()
    again = ["--resume"] if (folder / "run/args.json").exists() else []
    last = start(script, *options, "run", *again, cwd=folder)
    _, err = last.communicate()
    assert last.returncode == 0, err
    return phases, all(equal(weights(path), weights(folder / "run" / path.name))
                       for path in (folder / "whole").glob("*.pt"))


def kills(args, folder):
    good = True
    for script in args.scripts:
        (folder / script).mkdir()
        more = ["--teacher-epochs", 1, "--steps", 2] if script == "kd_swa" else []
        phases, same = kill_and_resume(script, args.n or 20, folder / script, more)
        counts = ", ".join(f"{phases.count(phase)} in {phase}" for phase in sorted(set(phases)))
        print(f"{script}: {len(phases)} kills ({counts}); weights "
              f"{'bitwise equal' if same else 'DIFFER'}", flush=True)
        good &= same
    return good


def lose_a_worker(victim, folder, options=()):
    """SIGKILL for one of torchrun's two processes; returns the seconds until all have ended, and
    what the other one said."""
    options = [ROOT / "backward_smoothing.py", *TINY, "--out", "run", "--epochs", 40, *options]
    process = subprocess.Popen([*TORCHRUN, *map(str, options)], cwd=folder, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=os.environ | {"PYTHONUNBUFFERED": "1"})
    for line in process.stdout:
        if re.match(r" +2  0\.", line):
            break
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = {}
    for pid in children:
        words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        ranks.update({int(word[5:]): int(pid) for word in words if word.startswith(b"RANK=")})
    began = time.perf_counter()
    os.kill(ranks[victim], signal.SIGKILL)
    _, err = process.communicate()
    said = re.findall(r"^backward_smoothing.py: error: (.*)$", err, re.M)
    return time.perf_counter() - began, said


def worker(args, folder):
    good = True
    for victim in (0, 1):
        (folder / str(victim)).mkdir()
        seconds, said = lose_a_worker(victim, folder / str(victim), ["--train-size", 320])
        done = subprocess.run([*TORCHRUN, ROOT / "backward_smoothing.py", *TINY, "--out", "run",
                               "--epochs", "40", "--train-size", "320", "--resume"],
                              cwd=folder / str(victim),
                              capture_output=True, text=True)
        print(f"process {victim + 1} of 2 killed: all ended after {seconds:.1f} s; said: {said}; "
              f"resumed: status {done.returncode}")
        good &= seconds < 60 and len(said) == 1 and done.returncode == 0
    return good


# -------------------------------------------------------------------------------------------- disk

def disk(args, folder):
    """A run fills a disk of 3 MB with checkpoints; some are removed, and it is resumed. Needs root,
    to mount that disk."""
    small = folder / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", small], check=True)
    try:
        command = [sys.executable, ROOT / "backward_smoothing.py", *TINY, "--train-size", "320",
                   "--keep-epochs", "--epochs", "7", "--out", small / "run"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        print(f"status {done.returncode}: {done.stderr.strip()}")
        epochs = [torch.load(path, weights_only=True)["epoch"]
                  for path in sorted(small.glob("run/*.pt"))]
        print(f"{len(epochs)} checkpoints, all whole")
        for path in small.glob("run/epoch-*.pt"):
            path.unlink()
        again = subprocess.run([*command, "--resume"], capture_output=True, text=True, cwd=folder)
        last = torch.load(small / "run/last.pt", weights_only=True)["epoch"]
        print(f"resumed with room: status {again.returncode}, epoch {last}; {again.stderr.strip()}")
        return (done.returncode == 2 and str(small) in done.stderr and len(epochs) > 2
                and again.returncode == 0 and last == 7)
    finally:
        subprocess.run(["umount", small], check=True)


# --------------------------------------------------------------------------------- files and words

class Code:
    """Unpickled carelessly, makes the file `touched`."""

    def __reduce__(self):
        return os.system, ("touch touched",)


def malform(path, kind, rng):
    """Damages the file at `path` in one of the ways of MALFORMED; `rng` a random.Random."""
    whole = bytearray(path.read_bytes())
    if kind == "cut":
        path.write_bytes(whole[:rng.randrange(len(whole))])
    elif kind == "flip":
        for _ in range(rng.choice((1, 1, 3, 30))):
            end = rng.choice((1500, len(whole)))
            whole[-rng.randrange(1, end)] ^= 1 << rng.randrange(8)
        path.write_bytes(whole)
    elif kind == "noise":
        place, n = rng.randrange(len(whole)), rng.choice((1, 10, 5000))
        whole[place:place + rng.choice((0, n))] = rng.randbytes(n)
        path.write_bytes(whole)
    elif kind == "nonsense":
        path.write_bytes(rng.choice((b"", b"\0" * 999, b"PK\3\4", b"<html>404", rng.randbytes(999),
                                     pickle.dumps([1]), b"\x80\x02.", b"\x80\x05N.")))
    elif kind == "code":
        state = torch.load(path, weights_only=True)
        if isinstance(state, dict):
            rng.choice((state, state["args"]))["evil"] = Code()
        rng.choice((lambda: torch.save(state if isinstance(state, dict) else Code(), path),
                    lambda: path.write_bytes(pickle.dumps(Code())),
                    lambda: torch.save(Code(), path, _use_new_zipfile_serialization=False)))()
    elif kind == "bomb":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("archive/data.pkl", pickle.dumps({}, 2))
            with file.open("archive/data/0", "w", force_zip64=True) as part:
                for _ in range(300):
                    part.write(bytes(1_000_000))
    else:
        state = torch.load(path, weights_only=True)
        junk = [None, -1, 10**12, math.nan, "x", "../../x", [], {}, {"x": 1}, [None] * 3, b"x",
                torch.zeros(3), torch.zeros(1).expand(10**12), torch.zeros(2, dtype=torch.int64)]
        where = state
        while isinstance(where, dict) and where:  # somewhere in it
            key = rng.choice(list(where))
            if not isinstance(where[key], dict) or not where[key] or rng.random() < 0.2:
                break
            where = where[key]
        if isinstance(where, list):
            key = rng.randrange(len(where))
        if kind == "lacks" and where:
            del where[key]
        else:
            where[key] = rng.choice(junk)
        if rng.random() < 0.1:
            state = rng.choice(junk)
        torch.save(state, path)


MALFORMED = ["cut", "flip", "noise", "nonsense", "code", "bomb", "lacks", "wrong", "wrong", "wrong"]


def run(module, *options):
    """A script in this process: its status, or the traceback, and what it wrote to stderr. Stops
    it after a minute."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = [f"{module.__name__}.py", *map(str, options)]

    def too_long(*_):
        raise TimeoutError("hangs")  # an OSError: so main would print it
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(60)
    status = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            common.main(module.parse_args, getattr(module, "train", None) or module.main)
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        status = traceback.format_exc()
    finally:
        signal.alarm(0)
        sys.argv = argv
    return status, err.getvalue()


def fingerprint(folder):
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def judge(status, err):
    """What is wrong with the outcome of a run, or None."""
    lines = [line for line in err.splitlines() if "skipping" not in line and " left" not in line]
    if "hangs" in err:
        return "hangs"
    if status not in (0, 2) or "Traceback" in err:
        return f"{status} {err}"
    if status == 2 and len(lines) != 1:
        return f"{len(lines)} lines: {err}"
    return "touched" if Path("touched").exists() else None


@contextlib.contextmanager
def at_work(folder):
    """In `folder`, with a smaller `shapes`, a finished run `run`, and pictures in `pets`."""
    import data
    draw, before = data.draw_shapes, os.getcwd()
    data.draw_shapes = lambda n, seed: draw(n // 20, seed)
    os.chdir(folder)
    try:
        make_folder(folder / "pets")
        status, err = run(backward_smoothing, *TINY, "--epochs", 1, "--out", "run")
        assert status == 0, err
        # Refused, for it has other classes; but now the pictures are decoded and cached.
        status, err = run(evaluate, "run/best.pt", *EVALUATION, "--dataset", "pets")
        assert status == 2 and "2" in err
        yield
    finally:
        os.chdir(before)
        data.draw_shapes = draw


EVALUATION = "--attack pgd --steps 1 --restarts 1 --n-examples 2 --plots curves".split()
PETS = "--dataset pets --arch resnet10 --width 8 --epochs 1 --batch-size 4 --val-size 4".split()


def malformed_files(n, folder, seed=0):
    """n malformed checkpoints and data caches, each given to a script; counts the outcomes by the
    kind of damage, and lists what went wrong."""
    rng, counts, wrong = random.Random(seed), {}, []
    with at_work(folder):
        shutil.copytree("run", "kept")
        before = fingerprint(folder)
        for i in range(n):
            kind, use = MALFORMED[i % len(MALFORMED)], ("judged", "resumed", "teacher", "cache",
                                                        "foreign")[i // len(MALFORMED) % 5]
            shutil.copytree("kept", "case")
            case = Path("case/last.pt")
            if use == "cache":
                case = next(Path("data").glob("pets-*.pt"))
                sound = case.read_bytes()
            malform(case, kind, rng)
            result = Path("case/result.json")
            if use == "judged":
                outcome = run(evaluate, "case/last.pt", *EVALUATION, "--out", "judged")
            elif use == "resumed":
                result.unlink()
                outcome = run(backward_smoothing, *TINY, "--epochs", 1, "--out", "case", "--resume")
            elif use == "teacher":
                outcome = run(kd_swa, *TINY, "--epochs", 1, "--steps", 1, "--kd", "std",
                              "--std-teacher", "case/last.pt", "--out", "taught")
            elif use == "foreign":
                outcome = run(evaluate, "case/last.pt", *EVALUATION[:-2], "--arch", "resnet10",
                              "--width", 8, "--dataset", "shapes", "--out", "judged")
            else:
                outcome = run(backward_smoothing, *PETS, "--out", "taught")
                if case.read_bytes() != sound and outcome[0] != 0:
                    wrong.append((kind, use, f"not decoded again: {outcome}"))
                case.write_bytes(sound)
            if problem := judge(*outcome):
                wrong.append((kind, use, problem))
            for made in ("case", "judged", "taught"):
                shutil.rmtree(made, ignore_errors=True)
            if fingerprint(folder) != before:
                changed = set(before.items()) ^ set(fingerprint(folder).items())
                wrong.append((kind, use, f"changed {changed}"))
                before = fingerprint(folder)
            counts.setdefault(kind, []).append(outcome[0])
    return counts, wrong


def malformed_words(n, folder, seed=0):
    """The same for n command lines, each with one or two words changed."""
    rng, counts, wrong = random.Random(seed), {}, []
    junk = ["", " ", "-1", "0", "nan", "inf", "1e999", "-0", "1e-320", "99999999999999999999",
            "0x10", "٣", "🐈", "a" * 5000, "../..", "/dev/null", "/dev/full",
            "pets/train/cat/0.png", "--", "-", "--eps", "None", "True", "[1]", "8;touch touched",
            "$(touch touched)", "%s", "{}", "\\", "\n", "meta", "cuda:77", "cpu:x", "run",
            "run/last.pt", "1.5", "1,5"]
    with at_work(folder):
        before = fingerprint(folder)
        for _ in range(n):
            module = rng.choice([*SCRIPTS.values(), evaluate])
            words = [*TINY, "--epochs", "1", "--train-size", "32", "--out", "new",
                     *(["--steps", "1", "--tf-kd"] if module is kd_swa else [])]
            if module is evaluate:
                words = ["run/best.pt", *EVALUATION, "--out", "new"]
            options = options_of(module)
            for _ in range(rng.choice((1, 2))):
                option = rng.choice([name for name in options if name not in (
                    "--help", "--epochs", "--compile")])  # these last too long
                change = rng.randrange(5)
                if change == 0:
                    words.insert(rng.randrange(len(words) + 1), rng.choice(junk))
                elif change == 1:
                    del words[rng.randrange(len(words))]
                elif option == "--out":
                    words += [option, rng.choice(["/dev/null", "/proc/x", "run", "pets/train"])]
                elif options[option].nargs == 0:
                    words.append(option)
                else:
                    words += [option, rng.choice(junk)]
            status, err = run(module, *words)
            if problem := judge(status, err):
                wrong.append((module.__name__, words, problem))
            counts.setdefault(module.__name__, []).append(status)
            for made in set(map(str, folder.rglob("*"))) - set(before):
                if Path(made).is_file() or not any(Path(made).iterdir()):
                    shutil.rmtree(made) if Path(made).is_dir() else Path(made).unlink()
            if any(fingerprint(folder).get(name) != digest for name, digest in before.items()):
                wrong.append((module.__name__, words, "changed a file"))
    return counts, wrong


def options_of(module):
    """The options that a script has: argparse's actions by name."""
    found = {}
    parse = argparse.ArgumentParser.parse_args

    def catch(parser, argv=None):
        found.update({action.option_strings[-1]: action for action in parser._actions
                      if action.option_strings})
        raise common.UserError("caught")
    argparse.ArgumentParser.parse_args = catch
    try:
        module.parse_args([])
    except common.UserError:
        pass
    finally:
        argparse.ArgumentParser.parse_args = parse
    return found


def report(counts, wrong):
    for name, statuses in counts.items():
        print(f"{name}: {statuses.count(0)} ran, {statuses.count(2)} refused in one line, "
              f"{len(statuses) - statuses.count(0) - statuses.count(2)} else")
    for problem in wrong:
        print("WRONG:", *problem)
    print(f"{sum(map(len, counts.values()))} in all; {len(wrong)} went wrong")
    return not wrong


def files(args, folder):
    return report(*malformed_files(args.n or 200, folder))


def words(args, folder):
    return report(*malformed_words(args.n or 200, folder))


# --------------------------------------------------------------------------- memory over long runs

def memory(pid):
    """Mebibytes of a process, and of its children what they do not share with it."""
    def of(one, what):
        found = re.search(rf"^{what}: +(\d+)", Path(f"/proc/{one}/smaps_rollup").read_text(), re.M)
        return int(found[1]) / 1024
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return of(pid, "Rss"), sum(of(child, "Private_Dirty") for child in children)


def memory_by_epoch(script, *options, cwd):
    """Runs a script; returns the most memory that it and its children took within each epoch,
    looked at ten times a second: two lists of mebibytes; and its status."""
    process = subprocess.Popen([sys.executable, ROOT / f"{script}.py", *map(str, options)], cwd=cwd,
                               text=True, stdout=subprocess.PIPE, stderr=sys.stderr,
                               env=os.environ | {"PYTHONUNBUFFERED": "1"})
    rows, seen = [], [(0, 0)]

    def look():
        while process.poll() is None:
            with contextlib.suppress(OSError, TypeError):  # one that has just ended
                seen.append(memory(process.pid))
            time.sleep(0.1)
    threading.Thread(target=look, daemon=True).start()
    for line in process.stdout:
        if re.match(r" +\d+  0\.\d+ +", line):
            rows.append([round(max(column)) for column in zip(*seen)])
            seen[:] = seen[-1:]
    return *map(list, zip(*rows)), process.wait()


def stream(args, folder):
    n = args.n or 20_000
    make_folder(folder / "pictures", n // 2, 100, 64, "jpg")
    began = time.perf_counter()
    rows, readers, status = memory_by_epoch(
        "fast_at", "--dataset", "pictures", "--arch", "resnet10", "--width", 8, "--image-size", 48,
        "--stream", "--epochs", 6, "--steps", 0, "--val-size", 200, "--out", "run", cwd=folder)
    print(f"{n:,} pictures streamed, at most {rows} mebibytes in each epoch, and {readers} more "
          f"in its readers; status {status}, {time.perf_counter() - began:.0f} s")
    return status == 0 and max(rows) < 1.05 * rows[0] and max(readers) < 1.25 * readers[0]


def endurance(args, folder):
    epochs, began = args.n or 500, time.perf_counter()
    rows, _, status = memory_by_epoch("backward_smoothing", *TINY, "--train-size", 64, "--epochs",
                                      epochs, "--out", "run", cwd=folder)
    log = (folder / "run/log.csv").read_text().splitlines()
    whole = [line.split(",")[0] for line in log] == ["epoch", *map(str, range(1, epochs + 1))]
    places = [0, epochs // 10, epochs // 2, epochs - 1]
    print(f"{epochs} epochs, {time.perf_counter() - began:.0f} s; mebibytes in epoch "
          + ", ".join(f"{place + 1}: {rows[place]}" for place in places)
          + f"; log {'whole' if whole else 'BROKEN'}; status {status}")
    return whole and status == 0 and rows[-1] < 1.05 * rows[epochs // 10]


# -------------------------------------------------------------------------- two processes and one

RAND, RANDN, RANDINT = torch.rand, torch.randn, torch.randint
KEPT = {(torch, name): getattr(torch, name) for name in ("rand", "randint", "randn_like")} | {
    (torch.Tensor, name): getattr(torch.Tensor, name) for name in ("uniform_", "normal_")}


def share_the_noise(n):
    """Makes each process take its share of noise that is drawn for a whole batch of n pictures; so
    one process or two see the same."""
    mine, same = n // common.WORLD, torch.Generator().manual_seed(0)

    def drawn(shape, draw, *args):
        axis = list(shape).index(mine)
        whole = draw(*args, [*shape[:axis], n, *shape[axis + 1:]], generator=same)
        return whole[tuple([slice(None)] * axis + [slice(common.RANK, None, common.WORLD)])]

    def rand(*sizes, device=None):
        return drawn(sizes if isinstance(sizes[0], int) else sizes[0], RAND)
    torch.rand = rand
    torch.randint = lambda high, shape, device=None: drawn(shape, RANDINT, high)
    torch.randn_like = lambda x: drawn(x.shape, RANDN)
    torch.Tensor.uniform_ = lambda x, low=0, high=1, generator=None: x.copy_(
        low + (high - low) * drawn(x.shape, RAND))
    torch.Tensor.normal_ = lambda x, generator=None: x.copy_(drawn(x.shape, RANDN))


METHODS = {
    "fast_at": "", "fast_at, GradAlign": "--grad-align 0.2", "trades": "--steps 2",
    "backward_smoothing": "", "fast_bat": "", "fast_bat, Hessian-aware": "--hessian-aware",
    "kd_swa": "--steps 2 --adv-teacher teacher/best.pt --std-teacher teacher/last.pt",
}


class Done(Exception):
    pass


def losses(args, folder):
    """Trains 20 steps by each method, with BatchNorm in eval mode; writes this process's losses.
    For `processes`, which also starts it under torchrun."""
    import data
    draw, data.draw_shapes = data.draw_shapes, lambda n, seed: draw(n // 10, seed)
    os.chdir(folder)
    if common.WORLD > 1:
        torch.distributed.init_process_group("gloo")
    found, start_epoch = {name: [] for name in METHODS}, bookkeeping.Run.start_epoch

    def start_in_eval_mode(run):
        start_epoch(run)
        run.model.eval()
        share_the_noise(run.args.batch_size)

    def stop(run, *_):
        raise Done
    bookkeeping.Run.start_epoch, bookkeeping.Run.end_epoch = start_in_eval_mode, stop
    for i, (name, more) in enumerate(METHODS.items()):
        module = SCRIPTS[name.split(",")[0]]

        def recorded(*args, loss_of=module.training_loss):
            loss = loss_of(*args)
            found[name].append(loss.item())
            return loss
        with contextlib.ExitStack() as stack:
            for (owner, key), genuine in KEPT.items():
                stack.callback(setattr, owner, key, genuine)
            stack.callback(setattr, module, "training_loss", module.training_loss)
            module.training_loss = recorded
            with contextlib.suppress(Done):
                module.train(module.parse_args([
                    *TINY, *more.split(), *"--batch-size 8 --train-size 160 --epochs 1".split(),
                    *"--lr 0.1 --precision fp32 --attack-bn eval --activation softplus".split(),
                    "--out", f"runs/{common.WORLD}-{i}"]))
    Path(f"losses-{common.WORLD}-{common.RANK}.json").write_text(json.dumps(found))
    if common.WORLD > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    return True


def differences(folder):
    """By method: the losses of one process, and by how much the means of two differ from them, at
    most and in parts of them."""
    running = [subprocess.Popen([*start, __file__, "losses", "--in", folder], cwd=folder, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                env=os.environ | {"OMP_NUM_THREADS": "1"})
               for start in ([sys.executable], TORCHRUN)]
    for process in running:
        said, _ = process.communicate()
        assert process.returncode == 0, said
    one, *two = (json.loads((folder / f"losses-{file}.json").read_text())
                 for file in ("1-0", "2-0", "2-1"))
    return {name: (losses, max(abs((a + b) / 2 - loss) / abs(loss) for loss, a, b in zip(
        losses, two[0][name], two[1][name], strict=True))) for name, losses in one.items()}


def train_teacher(folder):
    done = subprocess.run([sys.executable, ROOT / "fast_at.py", *TINY, "--train-size", "64",
                           "--epochs", "1", "--activation", "softplus", "--out", "teacher"],
                          cwd=folder, capture_output=True)
    assert done.returncode == 0


def processes(args, folder):
    train_teacher(folder)
    good = True
    for name, (one, worst) in differences(folder).items():
        good &= worst < 1e-4
        print(f"{name}: loss {one[0]:.4f} to {one[-1]:.4f} over {len(one)} steps; two processes "
              f"differ by at most {worst:.1e} of it", flush=True)
    seconds = {"one process of 2 threads": [], "two processes of 1 thread": []}
    for turn in range(3):
        for (name, found), start, threads in zip(seconds.items(), ([sys.executable], TORCHRUN),
                                                 "21"):
            out = folder / f"{threads}-{turn}"
            subprocess.run([*start, ROOT / "backward_smoothing.py", "--dataset", "shapes",
                            "--epochs", "2", "--out", out], cwd=folder, capture_output=True,
                           check=True, env=os.environ | {"OMP_NUM_THREADS": threads})
            found.append(json.loads((out / "result.json").read_text())["train_seconds"] / 2)
    for name, found in seconds.items():
        print(f"{name}: {' '.join(f'{second:.2f}' for second in found)} s an epoch of shapes")
    return good


FAULTS = [kills, worker, disk, files, words, stream, endurance, processes, losses]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    names = {function.__name__: function for function in FAULTS}
    parser.add_argument("fault", choices=names)
    parser.add_argument("--n", type=int, help="how many, instead of the number above")
    parser.add_argument("--scripts", nargs="+", choices=SCRIPTS, default=list(SCRIPTS),
                        help="of `kills`")
    parser.add_argument("--in", dest="folder", type=Path, help="a folder to work in; None: new")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        good = names[args.fault](args, folder.resolve())
    raise SystemExit(not good)


if __name__ == "__main__":
    main()
