"""A little of each fault in faults.py, and what they found."""

import contextlib
import json
import os
import resource
import subprocess
import threading

import pytest
import torch
from PIL import Image

import backward_smoothing
import bookkeeping
import common
import data
import evaluate
import fast_at
import faults
import models
from conftest import ROOT, TINY, data_options
from test_runs import equal, one_line, weights

PETS = ["--dataset", "pets", "--arch", "resnet10", "--width", 8, "--epochs", 2, "--val-size", 4,
        "--batch-size", 4]


# -------------------------------------------------------------------------------- several processes

def test_two_processes_have_the_losses_of_one(script, tmp_path):
    """Over 20 steps of every method, on the same batches and noise; BatchNorm in eval mode."""
    assert script(fast_at, *TINY, "--epochs", 1, "--activation", "softplus", "--out",
                  "teacher")[0] == 0
    found = faults.differences(tmp_path)
    assert set(found) == set(faults.METHODS)
    for name, (losses, worst) in found.items():
        assert len(losses) == 20 and worst < 1e-4, name


def test_each_picture_is_judged_once_and_by_one_process(model, monkeypatch):
    """Three processes that run here one after the other: their shares are disjoint and complete."""
    x, y = torch.arange(50)[:, None, None, None].expand(50, 3, 32, 32).byte(), torch.arange(50) % 10
    whole, seen, parts = common.still_right(model, x, y), [], []
    monkeypatch.setattr(common, "WORLD", 3)
    monkeypatch.setattr(common, "total", lambda part: parts.append(part) or part)

    def attack(model, x, y):
        seen.extend((x[:, 0, 0, 0] * 255).round().int().tolist())
        return x
    for rank in range(3):
        monkeypatch.setattr(common, "RANK", rank)
        common.still_right(model, x, y, attack, batch_size=7)
    assert sorted(seen) == list(range(50))
    assert torch.equal(sum(parts), whole.int())


def test_torchrun_evaluates_like_one_process(script, folder, tmp_path):
    script(backward_smoothing, *PETS, "--out", "run")
    options = ["run/best.pt", "--n-examples", "7", "--attack", "square", "cw", "rays", "--queries",
               "5", "--plots", "eps", "--out"]
    done = subprocess.run([*faults.TORCHRUN, ROOT / "evaluate.py", *options, "two"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("checkpoint") == 1 and (tmp_path / "two/eps.png").exists()
    row, = json.loads((tmp_path / "two/result.json").read_text())["rows"]
    assert script(evaluate, *options, "one")[0] == 0
    same, = json.loads((tmp_path / "one/result.json").read_text())["rows"]
    for name in ("n", "clean %", "CW-L2 %", "CW-L2 mean distance", "ADBD", "zero gradients %"):
        assert row[name] == pytest.approx(same[name], rel=1e-4), name  # these draw no noise


def test_one_of_two_processes_is_killed(tmp_path):
    seconds, said = faults.lose_a_worker(1, tmp_path, ["--train-size", 320])
    assert seconds < 60 and len(said) == 1
    assert "process 1 of 2" in said[0] and "--out run --resume goes on" in said[0]
    state = torch.load(tmp_path / "run/last.pt", weights_only=True)
    assert state["epoch"] >= 2 and len(state["random"]) == 2


def test_the_loss_of_a_process_is_said_by_the_others(monkeypatch, script):
    def lost(args):
        raise RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer")
    monkeypatch.setattr(backward_smoothing, "train", lost)
    one_line(*script(backward_smoothing, *TINY)[::2], "another process has ended")


# ------------------------------------------------------------------------------- killed and resumed

def test_killed_at_any_moment_a_run_resumes_to_the_same_weights(tmp_path):
    """The weights, and their average: once anywhere, and once while a checkpoint is written."""
    pets = faults.make_folder(tmp_path / "pets", 40)
    phases, same = faults.kill_and_resume("kd_swa", 2, tmp_path, [
        "--dataset", pets, "--tf-kd", "--steps", 1])
    assert same and len(phases) == 2


# --------------------------------------------------------------------------------------- full disks

@pytest.fixture
def full(tmp_path):
    """Makes a checkpoint of the run in `run` fall on a full disk."""
    def fill(name):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / f"run/{name}.tmp").symlink_to("/dev/full")
    return fill


@pytest.mark.parametrize("name", ["last.pt", "best.pt", "log.csv", "result.json"])
def test_a_full_disk_is_named_and_the_checkpoint_before_is_whole(script, tmp_path, full, name):
    script(backward_smoothing, *TINY, "--out", "whole")
    end, ends = bookkeeping.Run.end_epoch, []

    def fill_in_epoch_2(run, *args):
        ends.append(1)
        if len(ends) == 2:
            full(name)
        end(run, *args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bookkeeping.Run, "end_epoch", fill_in_epoch_2)
        status, _, err = script(backward_smoothing, *TINY, "--out", "run")
    one_line(status, err, f"cannot write run/{name}: No space left on device .disk /.*--resume")
    assert not (tmp_path / f"run/{name}.tmp").is_symlink()  # it may be what fills the disk
    for file in (tmp_path / "run").glob("*.pt"):
        weights(file)
    assert not (tmp_path / "run/result.json").exists()
    assert script(backward_smoothing, *TINY, "--out", "run", "--resume")[0] == 0
    assert equal(weights(tmp_path / "run/last.pt"), weights(tmp_path / "whole/last.pt"))


def test_a_disk_that_fills_up_within_a_checkpoint(script, tmp_path, monkeypatch):
    """torch.save then raises another error than the system's."""
    end = bookkeeping.Run.end_epoch
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def small_from_epoch_2(run, *args):
        if run.epoch == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
        end(run, *args)
    monkeypatch.setattr(bookkeeping.Run, "end_epoch", small_from_epoch_2)
    try:
        status, _, err = script(backward_smoothing, *TINY, "--out", "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    one_line(status, err, "cannot write run/(best|last).pt: File too large")
    assert torch.load(tmp_path / "run/last.pt", weights_only=True)["epoch"] == 1
    assert not list((tmp_path / "run").glob("*.tmp"))


@pytest.mark.parametrize("out", ["/dev/null/run", "/proc/run"])
def test_a_folder_that_cannot_be_made(script, out):
    one_line(*script(backward_smoothing, *TINY, "--out", out)[::2], f"{out}.*(Not a|No such)")


def test_a_cache_that_cannot_be_written_is_done_without(script, folder):
    status, out, err = script(backward_smoothing, *PETS, "--data-dir", "/proc")
    assert status == 0, err
    assert "warning: no cache: cannot write /proc/pets-" in out


# ----------------------------------------------------------------------------- no memory, no signal

@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_too_little_memory(script, monkeypatch, error):
    def fail(args):
        raise error
    monkeypatch.setattr(backward_smoothing, "train", fail)
    one_line(*script(backward_smoothing, *TINY)[::2], "out of memory .*--batch-size")


def test_a_bug_is_not_hidden(script, monkeypatch):
    def fail(args):
        raise RuntimeError("a bug")
    monkeypatch.setattr(backward_smoothing, "train", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        script(backward_smoothing, *TINY)


def test_sigterm_says_how_to_go_on(script, monkeypatch, tmp_path):
    start = bookkeeping.Run.start_epoch

    def terminate(run):
        start(run)
        if run.epoch == 1:
            os.kill(os.getpid(), faults.signal.SIGTERM)
    monkeypatch.setattr(bookkeeping.Run, "start_epoch", terminate)
    status, _, err = script(backward_smoothing, *TINY, "--out", "run")
    one_line(status, err, "interrupted: run/last.pt holds all .*--out run --resume goes on")


# ------------------------------------------------------------------------ malformed files and words

def test_malformed_files(tmp_path):
    counts, wrong = faults.malformed_files(30, tmp_path, seed=7)
    assert not wrong and set(counts) == set(faults.MALFORMED)
    assert sum(status == 2 for statuses in counts.values() for status in statuses) > 15


def test_malformed_command_lines(tmp_path):
    counts, wrong = faults.malformed_words(30, tmp_path, seed=7)
    assert not wrong
    assert sum(status == 2 for statuses in counts.values() for status in statuses) > 15


def test_the_harness_notices(tmp_path, monkeypatch):
    """Code that is executed, more than one line, a traceback."""
    monkeypatch.chdir(tmp_path)
    assert faults.judge(0, "") is faults.judge(2, "a line") is None
    assert faults.judge(2, "") and faults.judge(2, "two\nlines") and faults.judge("Traceback", "")
    torch.save(faults.Code(), "code.pt")
    torch.load("code.pt", weights_only=False)
    assert faults.judge(0, "") == "touched"


def test_damage_within_the_weights_is_noticed(script, tmp_path):
    """A flipped bit in a tensor, which torch.load itself does not see."""
    script(backward_smoothing, *TINY, "--epochs", 1, "--out", "run")
    whole = bytearray((tmp_path / "run/last.pt").read_bytes())
    whole[whole.index(weights(tmp_path / "run/last.pt")["linear.bias"].numpy().tobytes())] ^= 4
    (tmp_path / "flipped.pt").write_bytes(whole)
    assert not equal(weights(tmp_path / "flipped.pt"), weights(tmp_path / "run/last.pt"))
    one_line(*script(evaluate, "flipped.pt")[::2], r"flipped.pt .*data/\d+ is damaged")


def test_a_checkpoint_cannot_name_a_file_outside_its_run(script, tmp_path):
    script(backward_smoothing, *TINY, "--epochs", 1, "--out", "run")
    state = torch.load(tmp_path / "run/last.pt", weights_only=True)
    state["beside"] = {"../evil_": state["model"]}
    torch.save(state, tmp_path / "run/last.pt")
    (tmp_path / "run/result.json").unlink()
    status, _, err = script(backward_smoothing, *TINY, "--epochs", 1, "--out", "run", "--resume")
    one_line(status, err, "run/last.pt is damaged")
    assert not list(tmp_path.glob("evil*"))


def test_a_false_width_does_not_fill_the_memory(script, tmp_path):
    script(backward_smoothing, *TINY, "--epochs", 1, "--out", "run")
    state = torch.load(tmp_path / "run/last.pt", weights_only=True)
    state["args"]["width"] = 100_000  # 30 TB
    torch.save(state, tmp_path / "wide.pt")
    one_line(*script(evaluate, "wide.pt")[::2], "wide.pt holds another architecture")


# ------------------------------------------------------------------------------- pictures from disk

def test_a_stream_is_a_tensor_that_stays_on_disk(folder, tmp_path):
    held, streamed = (data.load_data(data_options(folder, tmp_path, 4, stream=stream))
                      for stream in (False, True))
    args = data_options(batch_size=5, seed=3)
    for one, other in zip((held.train, held.val, held.test), streamed[:3]):
        assert one[0].shape == other[0].shape and torch.equal(one[1], other[1])
        index = torch.tensor([3, 0, 2])
        (back, pictures), = common.read(other[0], [index])
        assert torch.equal(back, index) and torch.equal(pictures, one[0][index])
        (_, pictures), = common.read(other[0][1:3], [torch.tensor([1])])
        assert torch.equal(pictures[0], one[0][2])
    epochs = []
    for pets in (held, streamed):
        torch.manual_seed(0)
        epochs.append(list(data.batches(pets, args, 1)))
    assert len(epochs[0]) == len(epochs[1]) == 2
    for (x, y), (x_streamed, y_streamed) in zip(*epochs):
        assert torch.equal(x, x_streamed) and torch.equal(y, y_streamed)


def test_streamed_training_is_the_same_training(script, folder, tmp_path):
    for out, more in (("held", []), ("streamed", ["--stream"])):
        status, text, err = script(backward_smoothing, *PETS, "--out", out, *more)
        assert status == 0, err
        assert ("decoding" in text) == (out == "held")
    assert equal(weights(tmp_path / "held/last.pt"), weights(tmp_path / "streamed/last.pt"))
    results = []
    for out, more in (("a", []), ("b", ["--stream"])):
        status, _, err = script(evaluate, "held/best.pt", "--attack", "pgd", "--steps", 2,
                                "--restarts", 1, "--plots", "eps", "sheet", "--out", out, *more)
        assert status == 0, err
        row, = json.loads((tmp_path / out / "result.json").read_text())["rows"]
        results.append([row[name] for name in ("n", "clean %", "PGD-2-1 %", "zero gradients %")])
    assert results[0] == results[1]


def test_pictures_are_resized_and_cropped_at_the_centre(folder, tmp_path):
    wide = Image.new("RGB", (128, 64), (255, 0, 0))
    wide.paste((0, 0, 255), (32, 0, 96, 64))  # the middle half
    for path in folder.rglob("*.png"):
        wide.save(path)
    (x, _), _, _ = data.read_folder(data_options(folder, tmp_path, image_size=32))
    assert x.shape[1:] == (3, 32, 32)
    assert (x[:, 2, :, 2:-2] > 250).all() and (x[:, 0, :, 2:-2] < 5).all()
    streamed = data.read_folder(data_options(folder, tmp_path, image_size=32, stream=True))[0][0]
    (_, pictures), = common.read(streamed, [torch.arange(8)])
    assert torch.equal(pictures, x[:8])


def test_every_data_set_takes_an_image_size():
    shapes = data.load_data(data_options(val_size=20, image_size=48))
    assert all(x.shape[1:] == (3, 48, 48) and x.dtype == torch.uint8 for x, _ in shapes[:3])


def test_what_is_too_large_for_memory_streams(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "fits", lambda size, device: size <= 24 * 3 * 32 * 32 - 1)
    assert isinstance(data.load_data(data_options(folder, tmp_path, 2)).train[0], data.Stream)
    monkeypatch.setattr(data, "fits", lambda size, device: size <= 24 * 3 * 32 * 32)
    assert isinstance(data.load_data(data_options(folder, tmp_path, 2)).train[0], torch.Tensor)


def test_what_fits():
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert data.fits(memory // 5, "cpu") and not data.fits(memory // 3, "cpu")


def test_a_picture_that_breaks_during_training_stops_the_run_or_is_skipped(script, folder,
                                                                           tmp_path, monkeypatch):
    start = bookkeeping.Run.start_epoch

    def breaks(run):
        start(run)
        if run.epoch == 1:
            (folder / "train/cat/0.png").write_text("broken")
    monkeypatch.setattr(bookkeeping.Run, "start_epoch", breaks)
    whole = (folder / "train/cat/0.png").read_bytes()
    options = [*PETS, "--stream", "--batch-size", 12, "--out"]
    status, _, err = script(backward_smoothing, *options, "stopped")
    one_line(status, err, "cat/0.png cannot be used .*--on-bad-file skip")
    assert torch.load(tmp_path / "stopped/last.pt", weights_only=True)["epoch"] == 1
    (folder / "train/cat/0.png").write_bytes(whole)
    status, _, err = script(backward_smoothing, *options, "skipped", "--on-bad-file", "skip")
    assert status == 0
    assert err.count("skipping a bad file") == 1 and "cat/0.png" in err


class Brightness(models.Classifier):
    """Takes dark pictures for class 0 and bright ones for class 1."""

    def __init__(self):
        super().__init__((0.0,) * 3, (1.0,) * 3)

    def logits(self, x):
        bright = x.mean((1, 2, 3)) - 0.5
        return torch.stack([-bright, bright], dim=1)


def test_a_skipped_picture_is_wrong_in_a_test_and_left_out_of_training(folder, tmp_path):
    for path in folder.rglob("*.png"):
        Image.new("RGB", (32, 32), "black" if path.parent.name == "cat" else "white").save(path)
    for part in ("train", "test"):
        (folder / part / "dog/2.png").write_text("broken")
    streamed, held = (data.load_data(data_options(
        folder, tmp_path, 1, stream=stream, on_bad_file="skip")) for stream in (True, False))
    x, y = streamed.test
    assert common.still_right(Brightness(), x, y).tolist() == [True] * 6 + [False, True]
    only = torch.tensor([6])
    assert common.still_right(Brightness(), x[only], y[only]).tolist() == [False]
    assert common.zero_gradients(Brightness(), x[only], y[only]) == 0
    (pictures, labels), = data.batches(streamed, data_options(batch_size=15, seed=0), 0)
    assert len(pictures) == 14 and torch.equal(pictures.mean((1, 2, 3)) > 0.4, labels.bool())
    assert held.test[1].tolist() == [0] * 4 + [1] * 3 and len(held.train[1]) == 14
    assert common.still_right(Brightness(), *held.test).all()


def test_a_batch_of_which_nothing_is_left(script, folder):
    for path in (folder / "train").rglob("[1-9].png"):
        path.write_text("broken")
    status, _, err = script(backward_smoothing, *PETS, "--stream", "--on-bad-file", "skip")
    assert status == 2
    assert "not one picture of a batch can be read" in err.splitlines()[-1]


def test_a_folder_without_one_good_picture(script, folder):
    for path in folder.rglob("*.png"):
        path.write_text("broken")
    one_line(*script(backward_smoothing, *PETS)[::2], "like all before it, is no picture")


def test_a_reader_that_is_killed(folder, tmp_path, monkeypatch):
    """One of the processes that read ahead."""
    monkeypatch.setattr(data, "open_picture", lambda path, size: os.kill(os.getpid(), 9))
    streamed = data.load_data(data_options(folder, tmp_path, 2, stream=True, image_size=32))
    with pytest.raises(common.UserError, match="reading pictures failed: .*worker"):
        list(common.read(streamed.train[0], [torch.arange(3)]))


# ---------------------------------------------------------------------------------- larger pictures

def test_large_pictures_get_imagenets_stem(tmp_path):
    """The spatial sizes are those of He et al. 2016, table 1; and its checkpoint loads."""
    model = models.build_model("resnet50", 7, width=8, size=224).eval()
    sizes = []
    for name in ("conv1", "layer1", "layer2", "layer3", "layer4"):
        getattr(model, name).register_forward_hook(
            lambda module, x, out: sizes.append(out.shape[-1]))
    assert model(torch.rand(1, 3, 224, 224)).shape == (1, 7)
    assert sizes == [112, 56, 28, 14, 7]
    assert model.conv1.weight.shape == (8, 3, 7, 7)
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    picture = torch.randint(256, (4, 3, 224, 224)).byte(), torch.arange(4)
    known = data.Data(picture, picture, picture, list("abcdefg"), True)
    found, _ = bookkeeping.load_model(tmp_path / "bare.pth", "cpu", "resnet50", 8, data=known,
                                      mean=[0.5] * 3, std=[0.25] * 3)
    x = torch.rand(2, 3, 224, 224)
    assert torch.allclose(found.eval()(x), model(x), atol=1e-5)


def test_torchvisions_resnet_50_has_the_same_weights_and_sizes():
    import torchvision
    theirs = torchvision.models.resnet50(num_classes=10)
    ours = models.build_model("resnet50", 10, size=224)
    renamed, _, _ = models.canonical(theirs.state_dict(), "resnet50")
    ours.load_state_dict(renamed)
    ours.mean.zero_()
    ours.std.fill_(1)
    x = torch.rand(1, 3, 224, 224)
    assert torch.allclose(ours.eval()(x), theirs.eval()(x), atol=1e-4)


@pytest.mark.parametrize("arch", ["resnet10", "preactresnet18", "wrn-16-8"])
def test_no_narrow_strided_convolution_of_one_pixel(arch):
    """Its weight gradient on CPUs writes beyond its memory if the batch is odd."""
    for width in (8, 15, 16):
        for module in models.build_model(arch, 10, width).modules():
            if isinstance(module, torch.nn.Conv2d) and module.in_channels < 16:
                assert module.kernel_size != (1, 1) or module.stride == (1, 1)


# ---------------------------------------------------------------------------------------- endurance

def test_memory_and_log_of_a_long_run(script, tmp_path):
    status, _, err = script(backward_smoothing, *TINY, "--epochs", 40, "--train-size", 16, "--out",
                            "run")
    assert status == 0, err
    log = (tmp_path / "run/log.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in log] == ["epoch", *map(str, range(1, 41))]
    assert threading.active_count() < 20 and len(list((tmp_path / "run").iterdir())) == 6
    with contextlib.suppress(FileNotFoundError):  # on Linux: no file is left open
        assert len(os.listdir("/proc/self/fd")) < 200
