"""What every attack promises on every network, PGD, Auto-PGD, AutoAttack-lite, and `accuracy`."""

import argparse
import functools
import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import attacks
import common
import fast_at
import fast_bat
import kd_swa
import trades
from backward_smoothing import backward_smoothing

EPS = 8 / 255
ATTACKS = {  # (model, x, y, bn) -> x_adv
    "pgd": lambda m, x, y, bn: common.pgd_attack(m, x, y, EPS, EPS / 2, 3, bn=bn),
    "pgd zero": lambda m, x, y, bn: common.pgd_attack(m, x, y, EPS, EPS, 1, start="zero", bn=bn),
    "pgd l2": lambda m, x, y, bn: common.pgd_attack(m, x, y, EPS, EPS / 2, 3, norm="l2", bn=bn),
    "fast_at": lambda m, x, y, bn: fast_at.fast_at(m, x, y, EPS, 1.25 * EPS, bn=bn),
    "fast_at l2": lambda m, x, y, bn: fast_at.fast_at(m, x, y, EPS, EPS, 2, norm="l2", bn=bn),
    "n-fgsm": lambda m, x, y, bn: fast_at.fast_at(m, x, y, EPS, EPS, init="noise", bn=bn),
    "trades": lambda m, x, y, bn: trades.trades(m, x, EPS, EPS / 2, 2, bn=bn),
    "trades l2": lambda m, x, y, bn: trades.trades(m, x, EPS, EPS, 1, "uniform", "l2", bn),
    "smoothing": lambda m, x, y, bn: backward_smoothing(m, x, EPS, EPS, bn=bn),
    "smoothing l2": lambda m, x, y, bn: backward_smoothing(m, x, EPS, EPS, y=y, norm="l2", bn=bn),
    "fast_bat": lambda m, x, y, bn: fast_bat.fast_bat(m, x, y, EPS, 255 / 5000, bn=bn)[0],
    "corner": lambda m, x, y, bn: fast_bat.fast_bat(m, x, y, EPS, 255 / 5000, "corner", bn)[0],
    "kd_swa": lambda m, x, y, bn: kd_swa.attack(m, x, y, argparse.Namespace(
        attack="trades", steps=2, eps=EPS, alpha=EPS, norm="linf", attack_bn=bn)),
    "lite": lambda m, x, y, bn: attacks.autoattack_lite(m, x, y, EPS, steps=5),
    "lite l2": lambda m, x, y, bn: attacks.autoattack_lite(m, x, y, EPS, norm="l2", steps=5),
}


class ViT(nn.Module):
    """A Vision Transformer of two layers, for 4x4 patches of 8x8 images."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.place = nn.Parameter(0.1 * torch.randn(1, 4, 16))
        self.layers = nn.Sequential(*[nn.TransformerEncoderLayer(
            16, 2, 32, activation="gelu", batch_first=True) for _ in range(2)])
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.layers(self.patches(x).flatten(2).mT + self.place).mean(1))


def convolutional(*layers, first=lambda layer: layer, channels=3):
    return nn.Sequential(first(nn.Conv2d(channels, 8, 3, 1, 1)), *layers, nn.ReLU(),
                         nn.Conv2d(8, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 5))


NETWORKS = {
    "inside": lambda: nn.Sequential(nn.Identity(), common.Classifier("resnet10", 5, 16)),
    "parallel": lambda: nn.DataParallel(common.Classifier("resnet10", 5, 16)),
    "bn1d": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.BatchNorm1d(8),
                                  nn.Softplus(), nn.Linear(8, 5)),
    "bn3d": lambda: convolutional(nn.Unflatten(1, (2, 4)), nn.BatchNorm3d(2), nn.Flatten(1, 2)),
    "syncbn": lambda: convolutional(nn.SyncBatchNorm(8)),
    "instance": lambda: convolutional(nn.InstanceNorm2d(8, affine=True, track_running_stats=True)),
    "group": lambda: convolutional(nn.GroupNorm(2, 8), nn.Dropout(0.5)),
    "none kept": lambda: convolutional(nn.BatchNorm2d(8, track_running_stats=False)),
    "frozen": lambda: convolutional(nn.BatchNorm2d(8).eval(), nn.BatchNorm2d(8)),
    "constant": lambda: convolutional(torchvision.ops.FrozenBatchNorm2d(8)),
    "cumulative": lambda: convolutional(nn.BatchNorm2d(8, momentum=None)),
    "spectral": lambda: convolutional(nn.BatchNorm2d(8), first=spectral_norm),
    "old spectral": lambda: convolutional(first=nn.utils.spectral_norm),
    "weight norm": lambda: convolutional(nn.BatchNorm2d(8), first=weight_norm),
    "grey": lambda: convolutional(nn.BatchNorm2d(8), channels=1),
    "vit": ViT}


def network_and_images(name):
    """A network in train mode, images that touch 0 and 1, and what it takes them for."""
    torch.manual_seed(0)
    network = NETWORKS[name]()
    x = torch.rand(6, 1 if name == "grey" else 3, 8, 8)
    network(x)
    x[0], x[1] = 0, 1
    with common.attacking(network, x):
        return network, x, network(x).argmax(1)


def everything(model):
    """All that an attack could change: modes, and the bits of parameters, gradients, buffers."""
    def bits(tensor):
        return tensor.numpy(force=True).tobytes()
    return ([(m.training, getattr(m, "track_running_stats", None)) for m in model.modules()],
            [(n, bits(p), p.requires_grad, p.grad if p.grad is None else bits(p.grad))
             for n, p in model.named_parameters()],
            [(n, bits(buffer)) for n, buffer in model.named_buffers()])


@pytest.mark.parametrize("bn", ["eval", "train"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_attack_keeps_its_bounds_and_leaves_every_network_as_it_was(name, bn):
    model, x, y = network_and_images(name)
    for parameter in model.parameters():
        parameter.grad = torch.rand_like(parameter)
    before, kept = everything(model), x.clone()
    x.requires_grad_()
    for attack, function in ATTACKS.items():
        with torch.set_grad_enabled(bn == "eval"):  # inside torch.no_grad(), too
            x_adv = function(model, x, y, bn)
        delta = (x_adv - kept).flatten(1)
        radius = delta.norm(dim=1).max() if "l2" in attack else delta.abs().max()
        assert EPS / 2 < radius <= (3 if attack == "n-fgsm" else 1) * EPS + 1e-6, attack
        assert x_adv.min() >= 0 and x_adv.max() <= 1 and not x_adv.requires_grad, attack
        assert everything(model) == before and torch.equal(x, kept) and x.grad is None, attack
    fast_at.misalignment(model, x, y, EPS, bn=bn)
    with pytest.raises(KeyError), common.attacking(model, x, bn):
        raise KeyError  # after an error, too
    assert everything(model) == before


@pytest.mark.parametrize("name", ["inside", "bn1d", "bn3d", "syncbn", "instance", "cumulative"])
def test_the_mode_of_batchnorm_in_an_attack(name):
    """"eval" is the evaluated network; "train" normalises as in training, without dropout."""
    model, x, _ = network_and_images(name)
    x, logits = torch.rand_like(x), {}
    model.append(nn.Dropout(0.5))
    for bn in ("train", "eval"):
        with common.attacking(model, x, bn):
            logits[bn] = model(x)
    model[-1].p = 0.0
    assert torch.allclose(model.eval()(x), logits["eval"], atol=1e-5)
    assert torch.allclose(model.train()(x), logits["train"], atol=1e-5)
    assert not torch.allclose(logits["train"], logits["eval"], atol=1e-3)


def test_the_other_attacks_return_no_graph_either():
    model, x, y = network_and_images("bn1d")
    for attack, options in ((attacks.square, dict(eps=EPS, queries=3)),
                            (attacks.cw_l2, dict(steps=2)), (attacks.rays, dict(queries=9))):
        assert not attack(model, x.requires_grad_(), y, **options).requires_grad and x.grad is None


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_refuse_what_is_no_image_in_0_1(attack):
    model, x, y = network_and_images("bn1d")
    nearly = x + 5e-7 * torch.where(x > 0.5, 1, -1)
    x_adv = ATTACKS[attack](model, nearly, y, "eval")
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    for bad in (-2e-6, 1.1, math.nan):
        x[2, 0, 5, 5] = bad
        with pytest.raises(ValueError, match=r"\[0, 1\].*normalise inside"):
            ATTACKS[attack](model, x, y, "eval")
    with pytest.raises(ValueError, match="normalise inside"):
        ATTACKS[attack](model, (nearly - 0.5) / 0.25, y, "train")


# ------------------------------------------------------------------ projection, steps, random start
def test_projection_and_steps_by_hand():
    def image(*values):
        return torch.tensor(values).view(1, 1, 2, 2)
    x, gradient = image(0.5, 0.5, 0.98, 0.0), image(3.0, -4.0, 0.0, 0.0)  # of norm 5
    far = x + gradient / 10
    for point, expected in (
            (common.step(x, gradient, x, 0.1, 0.05), (0.55, 0.45, 0.98, 0)),
            (common.step(x, gradient, x, 0.1, 0.05, "l2"), (0.53, 0.46, 0.98, 0)),
            (common.step(x, 0 * gradient, x, 0.1, 0.05, "l2"), (0.5, 0.5, 0.98, 0)),
            (common.step(x, gradient / 1e18, x, 0.1, 0.05, "l2"), (0.53, 0.46, 0.98, 0)),
            (common.step(far, gradient, x, 0.1, 0.05, "l2"), (0.56, 0.42, 0.98, 0)),
            (common.project(x + 0.3, x, 0.1), (0.6, 0.6, 1, 0.1)),
            (common.project(far, x, 0.1, "l2"), (0.56, 0.42, 0.98, 0))):
        assert torch.allclose(point, image(*expected), atol=1e-6)
    assert attacks.eta(3)[0, 1] / attacks.eta(3)[0, 0] == pytest.approx(5)  # 1 + 1/4 over 1/4


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_eps_0_gives_the_image_itself(norm):
    model, x, y = network_and_images("bn1d")
    for x_adv in (common.project(torch.rand_like(x), x, 0, norm), common.random_start(x, 0, norm),
                  common.pgd_attack(model, x, y, 0, 0, 3, norm=norm),
                  common.pgd_attack(model, x, y, 0, 0.1, 3, norm=norm, start="zero"),
                  attacks.autoattack_lite(model, x, y, 0, norm=norm, steps=5),
                  attacks.square(model, x, y, 0, norm=norm, queries=5)):
        assert torch.equal(x_adv, x)


def test_the_random_start_is_uniform_in_the_ball():
    torch.manual_seed(0)
    x = torch.full((4000, 3, 2, 2), 0.5)
    noise = ((common.random_start(x, 0.1) - x) / 0.1).flatten().sort().values
    assert torch.allclose(noise, torch.linspace(-1, 1, len(noise)), atol=0.02)
    noise = (common.random_start(x, 0.1, "l2") - x).flatten(1) / 0.1
    volume = (noise.norm(dim=1) ** 12).sort().values  # in 12 dimensions
    assert torch.allclose(volume, torch.linspace(0, 1, 4000), atol=0.03)
    assert torch.allclose(14 * noise.T.cov(), torch.eye(12), atol=0.1)  # the same in all directions
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 3, 4)]
    a, b, c = (common.random_start(x, 0.1, "l2", generator) for generator in generators)
    assert torch.equal(a, b) and not torch.equal(a, c)


# ----------------------------------------------------------------------- a linear model, accuracy
class Brightness(nn.Module):
    """Logits (0, scale (w x - 0.5), -1, -2, ...), where w x is by default the mean of the image."""

    def __init__(self, classes=2, scale=1.0, w=1 / 192):
        super().__init__()
        self.rest, self.scale, self.w, self.seen = range(2, classes), scale, w, []

    def forward(self, x):
        self.seen.append(len(x))
        rise = (x * self.w).flatten(1).sum(1) - 0.5
        return torch.stack([0 * rise, self.scale * rise, *[0 * rise + 1 - i for i in self.rest]], 1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("classes, attack, options", [
    (2, common.pgd_attack, dict(alpha=0.025, steps=40)), (2, attacks.apgd_attack, {}),
    (2, common.pgd_attack, dict(alpha=0.025, steps=40, loss=attacks.margin)),
    (2, attacks.apgd_attack, dict(target=torch.zeros(4).long())),
    (5, attacks.apgd_attack, dict(target=torch.zeros(4).long()))])
def test_attacks_reach_the_closed_form_on_a_linear_model(norm, classes, attack, options):
    """The labels are so sure that nothing is fooled: the end is a corner or pole of the ball."""
    torch.manual_seed(0)
    x = torch.rand(4, 3, 8, 8) * 0.4 + 0.3  # away from the bounds of [0, 1]
    w, eps = 0.03 + 0.01 * torch.randn(3, 8, 8), 0.1  # w x is about 3
    down = -w.sign() if norm == "linf" else -w / w.norm()
    x_adv = attack(Brightness(classes, w=w), x, torch.ones(4).long(), eps, norm=norm, **options)
    assert torch.allclose(x_adv, x + eps * down, atol=2e-3 if norm == "l2" else 1e-6)


def greys(*values):
    """Images of one grey each, and their labels, all 1."""
    return torch.tensor(values).view(-1, 1, 1, 1).repeat(1, 3, 8, 8), torch.ones(len(values)).long()


def test_accuracy_counts_what_stays_right():
    """Those above 0.5 are right, and stay so if they are further than eps from it."""
    x, y = greys(0.3, 0.49, 0.52, 0.54, 0.56, 0.58, 0.9)
    y[0], eps = 0, 0.05
    for images in (x, (255 * x).round().byte()):  # float images are in [0, 1] already
        assert common.accuracy(Brightness(), images, y, eps) == pytest.approx((600 / 7, 400 / 7))
    figures = common.accuracy(Brightness(), x, y, eps * math.sqrt(192), norm="l2")
    assert figures == pytest.approx((600 / 7, 400 / 7))  # as each pixel is moved by eps
    assert common.still_correct(Brightness(), x, y).tolist() == [True, False] + [True] * 5
    assert common.accuracy(Brightness(), x, y, 0) == pytest.approx((600 / 7, 600 / 7))
    assert common.accuracy(Brightness(), *greys(0.3, 0.4), eps) == (0, 0)  # nothing to attack


def test_accuracy_is_the_same_each_time_and_leaves_everything_as_it_was(model, batch):
    x, y = batch[0], model.eval()(batch[0]).argmax(1)
    before, state = everything(model.train()), torch.get_rng_state()
    figures = [common.accuracy(model, x, y, 0.2 / 255, 2) for _ in range(2)]
    assert figures[0] == figures[1] and figures[0][0] == 100
    assert everything(model) == before and torch.equal(torch.get_rng_state(), state)


def test_each_attack_gets_what_the_earlier_ones_have_left():
    (x, y), seen = greys(0.25, 0.625, 0.75, 0.875, 1), []

    def darken(by, model, x, y):
        seen.append(x[:, 0, 0, 0].tolist())
        return x - by
    attacks = [functools.partial(darken, by) for by in (0.0, 0.1875, 0.3125)]
    left = common.still_correct(Brightness(), x, y, *attacks, batch_size=3)
    assert left.tolist() == [False, False, False, True, True]
    assert seen == [[0.25, 0.625, 0.75], [0.875, 1], [0.625, 0.75, 0.875], [1], [0.75, 0.875, 1]]


def test_batches_are_smaller_for_large_images():
    """By default they hold as many pixels as 128 images of 32x32 (500 on a GPU)."""
    for size, batch in ((32, [128, 2]), (64, [32] * 4 + [2]), (512, [1] * 3)):
        model, x = Brightness(), torch.rand(sum(batch), 3, size, size)
        model.__deepcopy__ = lambda memo: model  # so that `seen` is not that of a copy
        common.still_correct(model, x, torch.ones(len(x)).long())
        assert model.seen == batch


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_no_right_answer(capsys, bad):
    """argmax of NaN is class 0, so images of class 0 would count as right."""
    with pytest.raises(SystemExit) as stop:
        common.accuracy(Brightness(scale=bad), *greys(0.6, 0.7), 0.01)
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith("the network's logits are not finite\n")


# -------------------------------------------------------------------- Auto-PGD and AutoAttack-lite
class Wavy(nn.Module):
    """A smooth network of 4 classes, whose loss has many maxima within the ball."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(75, 30), nn.Linear(30, 4)

    def forward(self, x):
        z = 2 * self.last(torch.sin(6 * self.first(x.flatten(1))))
        return z + 3 * F.one_hot(torch.tensor(0), 4)


def auto_pgd(look, start, x, eps, steps, norm):
    """Algorithm 1 for one image; look(z) -> the loss, its gradient, and whether z fools."""
    percents = [0, 22]  # section 3.2
    while percents[-1] <= 100:
        percents.append(percents[-1] + max(percents[-1] - percents[-2] - 3, 6))
    w = sorted({math.ceil(p * steps / 100) for p in percents if p <= 100})

    def project(z):
        d = z - x
        d = d.clamp(-eps, eps) if norm == "linf" else d * min(1, eps / d.norm().item())
        return (x + d).clamp(0, 1)
    point, previous, size, rises, halved = start, start, 2 * eps, 0, True
    f, gradient, fooled = look(point)
    best = best_at_check = f, point, gradient
    for k in range(steps):
        if fooled:
            break
        if k in w[1:]:
            condition_1 = rises < 0.75 * (k - w[w.index(k) - 1])
            condition_2 = not halved and best[0] == best_at_check[0]
            halved, rises, best_at_check = condition_1 or condition_2, 0, best
            if halved:
                size, (f, point, gradient) = size / 2, best
        direction = gradient.sign() if norm == "linf" else gradient / gradient.norm()
        z = project(point + size * direction)
        if k > 0:
            z = project(point + 0.75 * (z - point) + 0.25 * (point - previous))
        previous, point, f_before = point, z, f
        f, gradient, fooled = look(point)
        rises += f > f_before
        best = (f, point, gradient) if f > best[0] else best
    return point if fooled else best[1]


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("norm, eps", [("linf", 0.1), ("l2", 0.8)])
def test_auto_pgd_is_algorithm_1(norm, eps, targeted):
    """Also below 10 steps, where several checkpoints fall on one step."""
    torch.manual_seed(0)
    model, x, y = Wavy().double(), torch.rand(16, 3, 5, 5).double(), torch.zeros(16).long()
    target = torch.arange(16) % 3 + 1
    for steps in (1, 5, 10, 20, 100):
        x_adv = attacks.apgd_attack(model, x, y, eps, steps, norm=norm, generator=torch.Generator()
                                     .manual_seed(steps), target=target if targeted else None)
        start = common.random_start(x, eps, norm, torch.Generator().manual_seed(steps))
        for i in range(len(x)):
            def look(z):
                z = z.clone().requires_grad_()
                logits = model(z[None])[0]
                z_1, _, z_3, z_4 = logits.sort(descending=True).values[:4]
                dlr = (logits[target[i]] - logits[0]) / (z_1 - (z_3 + z_4) / 2)
                f = dlr if targeted else -logits.log_softmax(0)[0]
                gradient, = torch.autograd.grad(f, z)
                return f.item(), gradient, logits.argmax() != 0
            expected = auto_pgd(look, start[i], x[i], eps, steps, norm)
            assert torch.allclose(x_adv[i], expected, atol=1e-6), (steps, i)
    fooled = model(x_adv).argmax(1) != 0
    assert fooled.any() and not fooled.all()


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_autoattack_lite_finds_what_there_is_to_find(classes):
    """With logits so large that cross-entropy has no gradient, and with too few classes for DLR."""
    torch.manual_seed(0)
    x, y = greys(0.3, 0.51, 0.54, 0.56, 0.8)
    model = Brightness(classes, 1e5)
    for norm, eps in (("linf", 0.05), ("l2", 0.05 * math.sqrt(192))):
        ce = attacks.apgd_attack(model, x, y, eps, 10, norm=norm)
        assert (model(ce).argmax(1) == y).tolist() == [False] + [True] * 4
        x_adv = attacks.autoattack_lite(model, x, y, eps, norm=norm, steps=10)
        assert (model(x_adv).argmax(1) == y).tolist() == [False, False, False, True, True]
        assert torch.equal(x_adv[0], x[0])


def test_autoattack_lite_aims_at_nine_classes_and_leaves_what_is_fooled(monkeypatch):
    """Only images that are still right are attacked, and x_adv keeps what fooled the others."""
    aims, labels = [], torch.tensor([11, 11, 11, 3])

    def attack(model, x, y, eps, steps, *, norm, generator, target=None):
        aims.append((x[:, 0, 0, 0].tolist(), target if target is None else target.tolist()))
        x_adv = x.clone()
        x_adv[0] = 0.125 if len(aims) in (1, 3) else x_adv[0]  # fools the first and the third time
        return x_adv
    monkeypatch.setattr(attacks, "apgd_attack", attack)
    model = Brightness()  # says 11 where an image is brighter than 0.2, else 0
    model.forward = lambda x: torch.arange(12.0) + 20 * (x[:, :1, 0, 0] < 0.2) * torch.eye(12)[0]
    x_adv = attacks.autoattack_lite(model, greys(0.25, 0.5, 0.75, 1)[0], labels, 0.1)
    assert aims == [([0.25, 0.5, 0.75], None), ([0.5, 0.75], [10] * 2), ([0.5, 0.75], [9] * 2)] + [
        ([0.75], [label]) for label in range(8, 1, -1)]
    assert x_adv[:, 0, 0, 0].tolist() == [0.125, 0.125, 0.75, 1]
