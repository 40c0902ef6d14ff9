"""The mathematics of the attacks, recomputed here from their equations."""

import math

import pytest
import torch
import torch.nn.functional as F

import backward_smoothing
import common

EPS = 8 / 255


def smooth_method(model, x, **kwargs):
    """backward_smoothing.backward_smoothing, with the noise of seed 3."""
    torch.manual_seed(3)
    return backward_smoothing.backward_smoothing(model, x, EPS, kwargs.pop("alpha", EPS), **kwargs)


def recomputed(model, x, alpha, gamma=1.0, draws=1, y=None, alone=False):
    """Algorithm 1, eqs. (4.4) and (4.5) on probabilities, one draw of psi at a time."""
    model.eval()
    torch.manual_seed(3)
    f = model(x).detach()
    gradients = []
    for psi in torch.empty(draws, *f.shape).uniform_(-1, 1):
        xi = torch.zeros_like(x, requires_grad=True)
        t, s = torch.softmax(f + gamma * psi, 1), torch.softmax(model(x + xi), 1)
        (t * (t / s).log()).sum().backward()
        gradients.append(xi.grad)
    xi = (-alpha * sum(gradients).sign()).clamp(-EPS, EPS)
    xi = (x + xi).clamp(0, 1) - x
    if alone:
        return x + xi
    delta = torch.zeros_like(x, requires_grad=True)
    s, s_adv = torch.softmax(f, 1), torch.softmax(model(x + xi + delta), 1)
    rise = (s * (s / s_adv).log()).sum() if y is None else -s_adv.log()[range(len(y)), y].sum()
    rise.backward()
    return (x + (xi + alpha * delta.grad.sign()).clamp(-EPS, EPS)).clamp(0, 1)


@pytest.mark.parametrize("options", [{}, {"gamma": 4.0}, {"alone": True}, {"random_points": 5},
                                     {"alpha": EPS / 2}, {"y": torch.arange(6)}])
def test_backward_smoothing_is_algorithm_1(model, batch, options):
    model.double()
    x = batch[0].double()
    x_adv = smooth_method(model, x, **options)
    names = {"random_points": "draws"}
    options = {"alpha": EPS} | {names.get(k, k): v for k, v in options.items()}
    expected = recomputed(model, x, **options)
    assert torch.allclose(x_adv, expected, atol=1e-12)
    assert (x_adv - x).abs().max() > EPS / 3  # it does move


def test_smoothing_descends_and_the_attack_ascends(model, batch):
    """Small steps: KL(t || s(f(x + xi))) falls in the first, KL(s(f(x)) || s(f(x_adv))) rises."""
    model.double().eval()
    x = batch[0].double()
    f, alpha = model(x).detach(), 1e-4
    torch.manual_seed(3)
    target = F.softmax(f + torch.empty(1, *f.shape).uniform_(-1, 1)[0], 1)
    x_smooth = smooth_method(model, x, alpha=alpha, alone=True)
    x_adv = smooth_method(model, x, alpha=alpha)
    kl = backward_smoothing.kl
    assert kl(model(x_smooth), target) < kl(f, target)
    assert kl(model(x_adv), F.softmax(f, 1)) > kl(model(x_smooth), F.softmax(f, 1))


def test_the_smoothing_gradient_agrees_with_finite_differences(model, batch):
    model.double().eval()
    model.activation = torch.nn.Softplus()  # smooth, so that differences converge
    for block in model.modules():
        if hasattr(block, "activation"):
            block.activation = model.activation
    x = batch[0].double()[:1]
    f = model(x).detach()
    target = F.softmax(f + torch.tensor([1.0, -1] * 5), 1)
    x.requires_grad_()
    gradient, = torch.autograd.grad(backward_smoothing.kl(model(x), target), x)
    direction = torch.randn_like(x)
    h = 1e-5
    with torch.no_grad():
        rise = (backward_smoothing.kl(model(x + h * direction), target)
                - backward_smoothing.kl(model(x - h * direction), target)) / (2 * h)
    assert rise.item() == pytest.approx((gradient * direction).sum().item(), rel=1e-5)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_bounds(model, batch, norm):
    x, y = batch
    x[0], x[1] = 0, 1
    for x_adv in (smooth_method(model, x, norm=norm),
                  smooth_method(model, x, norm=norm, bn="train"),
                  common.pgd_attack(model, x, y, EPS, EPS / 2, 5, 2, norm),
                  common.random_start(x, EPS, norm)):
        delta = (x_adv - x).flatten(1)
        assert (delta.abs().amax() if norm == "linf" else delta.norm(dim=1).amax()) <= EPS + 1e-6
        assert x_adv.min() >= 0 and x_adv.max() <= 1
        assert not x_adv.requires_grad


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bn", ["eval", "train"])
def test_an_attack_leaves_the_model_as_it_was(model, batch, training, bn):
    model.train(training)
    model.layer1.eval()  # a mixture of modes must come back too
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = batch[0].clone()
    smooth_method(model, x, bn=bn)
    common.pgd_attack(model, x, batch[1], EPS, EPS, 2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(x, batch[0]) and not x.requires_grad
    model.train()(x)  # and statistics are tracked again
    assert not torch.equal(model.bn1.running_mean, before["bn1.running_mean"])


def test_the_mode_comes_back_after_an_error(model, batch):
    model.train()
    with pytest.raises(RuntimeError), common.attacking(model, batch[0]):
        raise RuntimeError
    assert model.training and model.bn1.track_running_stats


def test_batchnorm_in_the_attack(model, batch):
    """eval uses the running statistics, so a picture's attack does not depend on the others."""
    x = batch[0]
    with common.attacking(model.train(), x, "eval"):
        alone, together = model(x[:1]), model(x)[:1]
    assert torch.allclose(alone, together, atol=1e-5)
    with common.attacking(model.eval(), x, "train"):
        alone, together = model(x[:1]), model(x)[:1]
        assert not torch.allclose(alone, together, atol=1e-2)
    expected = model.train()(x)
    with common.attacking(model, x, "train"):
        assert torch.allclose(model(x), expected)


def test_k_random_points_equal_the_mean_target(model, batch):
    """The gradient at xi = 0 is linear in the target, so averaging targets averages gradients."""
    x = batch[0].double()
    model.double().eval()
    f = model(x).detach()
    psi = torch.empty(7, *f.shape, dtype=f.dtype).uniform_(-1, 1)
    targets = F.softmax(f + psi, -1)

    def gradient(target):
        z = x.clone().requires_grad_()
        return torch.autograd.grad(backward_smoothing.kl(model(z), target), z)[0]
    mean = torch.stack([gradient(target) for target in targets]).mean(0)
    assert torch.allclose(gradient(targets.mean(0)), mean, atol=1e-10)


@pytest.mark.parametrize("bad", [-0.1, 1.1, math.nan])
def test_attacks_refuse_what_is_not_a_picture(model, batch, bad):
    x, y = batch
    x[2, 0, 5, 5] = bad
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        smooth_method(model, x)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        common.pgd_attack(model, x, y, EPS, EPS, 1)


def test_training_loss(model, batch):
    """CE + beta KL(s(f(x)) || s(f(x_adv))), means over the batch, both in train mode (eq. 1.2)."""
    x, y = batch
    args = backward_smoothing.parse_args(["--dataset", "shapes", "--beta", "3", "--eps", "8"])
    x_adv = smooth_method(model.train(), x)  # the loss's forwards move the statistics it uses
    torch.manual_seed(3)
    loss = backward_smoothing.training_loss(model, x, y, args)
    s, s_adv = model(x).softmax(1), model(x_adv).softmax(1)
    expected = -s[range(6), y].log().mean() + 3 * (s * (s / s_adv).log()).sum(1).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert loss.requires_grad and loss.shape == ()

    args.objective = "ce"
    x_adv = smooth_method(model, x, y=y)
    torch.manual_seed(3)
    loss = backward_smoothing.training_loss(model, x, y, args)
    expected = F.cross_entropy(model(x_adv), y)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_every_option_of_the_method_changes_the_loss(model, batch):
    def loss(*options):
        torch.manual_seed(3)
        args = backward_smoothing.parse_args(["--dataset", "shapes", *options])
        return backward_smoothing.training_loss(model.train(), *batch, args).item()
    options = [[], ["--gamma", "5"], ["--beta", "2"], ["--alpha", "2"],
               ["--random-points", "9"], ["--alone"],
               ["--objective", "ce"], ["--norm", "l2"], ["--eps", "3"], ["--attack-bn", "train"]]
    assert len({loss(*each) for each in options}) == len(options)


def test_extreme_logits_stay_finite(batch):
    class Steep(torch.nn.Module):
        def forward(self, x):
            return 1e4 * x.flatten(1)[:, :10]
    args = backward_smoothing.parse_args(["--dataset", "shapes"])
    assert backward_smoothing.training_loss(Steep(), *batch, args).isfinite()


class Linear(torch.nn.Module):
    """Two classes: logits (0, w x), so that every loss rises along -+w."""

    def __init__(self, w):
        super().__init__()
        self.w = w
        self.logits, self.network, self.dtype = self.forward, self.forward, torch.float32

    def forward(self, x):
        return torch.stack([torch.zeros(len(x)), (x * self.w).flatten(1).sum(1)], 1)


@pytest.mark.parametrize("loss", ["ce", "margin"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_reaches_the_closed_form_on_a_linear_model(norm, loss):
    torch.manual_seed(0)
    w, eps = 0.01 * torch.randn(3, 8, 8), 0.1
    x = torch.rand(5, 3, 8, 8) * 0.4 + 0.3  # away from the bounds of [0, 1]
    y = torch.tensor([0, 1, 0, 1, 0])
    up = w.sign() if norm == "linf" else w / w.norm()
    up = up * torch.where(y == 0, 1, -1).view(-1, 1, 1, 1)
    x_adv = common.pgd_attack(Linear(w), x, y, eps, eps / 4, 40, norm=norm, loss=loss)
    assert torch.allclose(x_adv, x + eps * up, atol=1e-3 if norm == "l2" else 1e-6)


def test_margin_loss():
    logits = torch.tensor([[3.0, 1, 2], [0, 5, 4]])
    assert common.margin(logits, torch.tensor([0, 2])).tolist() == [2 - 3, 5 - 4]


def test_restarts_attack_only_what_is_right(batch):
    """A picture once fooled keeps its adversarial example, and costs no more passes."""
    seen = []

    class Coin(Linear):
        def forward(self, x):
            seen.append(len(x))
            return torch.stack([x.flatten(1)[:, 0] * 0, x.flatten(1)[:, 0] - 0.5], 1)
    model, y = Coin(torch.zeros(1)), torch.tensor([1, 1, 1, 1])
    x = torch.full((4, 3, 2, 2), 0.6)
    x[:2] = 0.45  # wrong from the start
    x_adv = common.pgd_attack(model, x, y, 0.01, 0.01, 1, restarts=3)
    assert seen == [4, 4, 2, 2, 2, 2]
    assert (model(x_adv).argmax(1) == y).tolist() == [False, False, True, True]


def test_random_start_is_uniform():
    torch.manual_seed(0)
    x = torch.full((2000, 3, 2, 2), 0.5)
    noise = (common.random_start(x, 0.1) - x).flatten() / 0.1
    assert abs(noise.mean()) < 0.02 and noise.var().item() == pytest.approx(1 / 3, rel=0.02)
    radius = (common.random_start(x, 0.1, "l2") - x).flatten(1).norm(dim=1) / 0.1
    uniform = radius ** 12  # in 12 dimensions
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.02)


def test_accuracy_counts_and_attacks_only_what_is_right():
    """One batch is smaller than the others: counts are summed, not averaged by batch."""
    model = Linear(torch.full((3, 2, 2), 1 / 12))
    model.forward = lambda x: torch.stack([x.mean((1, 2, 3)) * 0 + 0.5, x.mean((1, 2, 3))], 1)
    model.network = model.logits = model.forward
    x = torch.cat([torch.full((5, 3, 2, 2), 255), torch.zeros(2, 3, 2, 2)]).byte()
    y = torch.tensor([1, 1, 1, 1, 0, 0, 0])  # the fifth is wrong
    attacked = []

    def attack(model, x, y):
        attacked.append(len(x))
        return torch.where(y.view(-1, 1, 1, 1) == 1, torch.zeros_like(x), x)
    clean, robust = common.accuracy(model, x, y, attack, batch_size=3)
    assert clean == pytest.approx(100 * 6 / 7) and robust == pytest.approx(100 * 2 / 7)
    assert sum(attacked) == 6
    assert common.still_right(model, x, y).tolist() == [True] * 4 + [False, True, True]
    assert common.still_right(model, x[:0], y[:0], attack).shape == (0,)


# -------------------------------------------------------------------- Auto-PGD and AutoAttack-lite

@pytest.mark.parametrize("loss", ["ce", "dlr"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_apgd_reaches_the_closed_form_on_a_linear_model(norm, loss):
    """Labels so sure that nothing fools it: the end is the corner or the pole of the eps-ball."""
    torch.manual_seed(0)
    w, eps = 0.1 * torch.randn(3, 8, 8), 0.05
    model = Linear(w)
    model.forward = lambda x: torch.stack(
        [(x * w).flatten(1).sum(1), torch.full((len(x),), -5.0), torch.full((len(x),), -9.0)], 1)
    x = torch.rand(5, 3, 8, 8) * 0.4 + 0.3  # away from the bounds of [0, 1]
    y = torch.zeros(5, dtype=torch.long)
    up = -w.sign() if norm == "linf" else -w / w.norm()
    if loss == "dlr":  # (z_0 - z_1) / (z_0 - z_2) rises with z_0 as well
        assert common.dlr_loss(model.forward(x + eps * up), y).gt(
            common.dlr_loss(model.forward(x), y)).all()
    x_adv = common.apgd_attack(model, x, y, eps, 100, norm, loss)
    assert torch.allclose(x_adv, x + eps * up, atol=2e-3 if norm == "l2" else 1e-6)


def test_the_dlr_loss_is_its_formula():
    z = torch.tensor([[3.0, 1, 2, 0.5, -1], [0, 5, 4, 4.5, 1]])
    y, target = torch.tensor([0, 2]), torch.tensor([3, 0])
    expected = [-(3 - 2) / (3 - 1), -(4 - 5) / (5 - 4)]
    assert common.dlr_loss(z, y).tolist() == pytest.approx(expected)
    expected = [-(3 - 0.5) / (3 - (1 + 0.5) / 2), -(4 - 0) / (5 - (4 + 1) / 2)]
    assert common.dlr_loss(z, y, target).tolist() == pytest.approx(expected)
    moved = 100 * z + 7  # what it is for: scale and shift do not matter
    assert torch.allclose(common.dlr_loss(moved, y), common.dlr_loss(z, y))


def test_the_dlr_loss_with_ties_and_few_classes():
    tied = torch.ones(2, 4, requires_grad=True)
    for target in (None, torch.tensor([1, 2])):
        value = common.dlr_loss(tied, torch.tensor([0, 0]), target)
        assert value.tolist() == [0, 0]
        assert torch.autograd.grad(value.sum(), tied)[0].isfinite().all()
    z, y = torch.tensor([[3.0, 1, 2]]), torch.tensor([0])
    assert common.apgd_loss(z, y, loss="dlr") == common.dlr_loss(z, y)  # 3 classes are enough
    ce = {label: F.cross_entropy(z, torch.tensor([label])).item() for label in (0, 1)}
    targeted = common.apgd_loss(z, y, torch.tensor([1]), "dlr").item()  # but not with a target
    assert targeted == pytest.approx(-ce[1])
    assert common.apgd_loss(z[:, :2], y, loss="dlr").item() == pytest.approx(
        F.cross_entropy(z[:, :2], y).item())


def test_the_halving_rule_by_hand():
    """Windows of 0.22, then 0.03 shorter each time, but at least 0.06 (section 3.2), rounded up."""
    assert common.apgd_checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert common.apgd_checkpoints(10) == [3, 5, 6, 7, 8, 9, 10, 10]
    best, before = torch.tensor([2.0, 2, 2, 2]), torch.tensor([1.0, 1, 2, 2])
    rises, halved = torch.tensor([14, 15, 16, 16]), torch.tensor([False, False, False, True])
    # 14 < 0.75 * 20; 15 is not; no progress at the same size; no progress, but the size changed
    assert common.must_halve(rises, 20, halved, best, before).tolist() == [True, False, True, False]


@pytest.mark.parametrize("norm, loss, targeted", [("linf", "ce", False), ("linf", "dlr", True),
                                                  ("l2", "ce", False), ("l2", "dlr", True)])
def test_apgd_is_algorithm_1(model, batch, monkeypatch, norm, loss, targeted):
    """Against the algorithm written for one picture at a time, on pictures that it cannot fool."""
    model.double().eval()
    x, eps, steps = batch[0].double(), (0.01 if norm == "linf" else 0.1), 23
    bias = torch.zeros(10).double()
    bias[0] = 50
    with torch.no_grad():
        model.linear.bias += bias
        model.linear.weight *= 3
    y, target = torch.zeros(6, dtype=torch.long), torch.arange(1, 7) if targeted else None
    start = common.random_start(x, eps, norm)
    monkeypatch.setattr(common, "random_start", lambda *args: start)
    x_adv = common.apgd_attack(model, x, y, eps, steps, norm, loss, target)

    def ball(z, centre):
        d = z - centre
        d = d.clamp(-eps, eps) if norm == "linf" else d * min(1, eps / d.norm().item())
        return (centre + d).clamp(0, 1)

    for i in range(6):
        def f(z):
            z = z.clone().requires_grad_()
            value = common.apgd_loss(model(z[None]), y[i:i + 1],
                                     target[i:i + 1] if targeted else None, loss)[0]
            g, = torch.autograd.grad(value, z)
            return value.item(), g.sign() if norm == "linf" else g / g.norm()
        points, size, halved = [start[i]], 2 * eps, [True]
        values, directions = [f(points[0])[0]], [f(points[0])[1]]
        best, best_at_check, since, k = 0, values[0], 0, 0
        current = 0  # the point that the next step starts from
        for k in range(steps):
            z = ball(points[current] + size * directions[current], x[i])
            if k:
                z = ball(points[current] + 0.75 * (z - points[current])
                         + 0.25 * (points[current] - points[previous]), x[i])
            value, direction = f(z)
            since += value > values[current]
            points, values, directions = points + [z], values + [value], directions + [direction]
            previous, current = current, len(points) - 1
            best = current if value > values[best] else best
            if k + 1 in common.apgd_checkpoints(steps):
                checks = [0] + common.apgd_checkpoints(steps)
                window = k + 1 - checks[checks.index(k + 1) - 1]
                halve = since < 0.75 * window or (not halved[-1] and values[best] == best_at_check)
                halved.append(halve)
                best_at_check, since = values[best], 0
                if halve:
                    size, current = size / 2, best
        assert any(halved[1:])
        assert torch.allclose(x_adv[i], points[best], atol=1e-9)


@pytest.mark.parametrize("norm, eps", [("linf", 8 / 255), ("l2", 0.5)])
def test_autoattack_lite_stays_in_its_bounds_and_leaves_the_model_as_it_was(model, batch, norm,
                                                                            eps):
    x, y = batch
    x[0], x[1] = 0, 1
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x_adv = common.autoattack_lite(model.train(), x, y, eps, norm, 8)
    distance = (x_adv - x).flatten(1).norm(math.inf if norm == "linf" else 2, dim=1)
    assert (distance <= eps + 1e-6).all() and distance.max() > 0
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    assert model.training and model.bn1.track_running_stats
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def own_labels(model, n=40):
    """Pictures, and what the model takes them for."""
    torch.manual_seed(2)
    x = (torch.rand(n, 3, 32, 32) * 255).byte()
    with common.exact(model) as network, torch.no_grad():
        return x, network(x.float() / 255).argmax(1)


def lite(eps, steps):
    return lambda model, x, y: common.autoattack_lite(
        model, x, y, eps, steps=steps, generator=torch.Generator().manual_seed(0))


def test_more_iterations_never_help_the_defender(model):
    x, y = own_labels(model)
    left = [common.still_right(model, x, y, lite(0.06 / 255, steps)).sum() for steps in (5, 10, 20)]
    assert left[0] >= left[1] >= left[2] and 0 < left[2] < 40


def test_autoattack_lite_is_the_worst_case_of_its_parts(model):
    """It fools whatever Auto-PGD on cross-entropy fools, and cannot be undone by a later target."""
    x, y = own_labels(model)
    ce = common.still_right(model, x, y, lambda model, x, y: common.apgd_attack(
        model, x, y, 0.2 / 255, 10, generator=torch.Generator().manual_seed(0)))
    whole = common.still_right(model, x, y, lite(0.2 / 255, 10))
    assert not (whole & ~ce).any() and whole.sum() < ce.sum()


def test_autoattack_lite_aims_at_the_nine_likeliest_wrong_classes(monkeypatch):
    aims = []

    def attack(model, x, y, eps, steps, norm, loss="ce", target=None, generator=None):
        aims.append((loss, None if target is None else target.tolist()))
        return x
    monkeypatch.setattr(common, "apgd_attack", attack)
    model = Linear(0)
    model.forward = lambda x: torch.arange(12.0).expand(len(x), 12)
    common.autoattack_lite(model, torch.rand(2, 3, 4, 4), torch.tensor([11, 11]), 0.1)
    assert aims == [("ce", None)] + [("dlr", [c, c]) for c in range(10, 1, -1)]


def test_what_fools_the_model_is_attacked_no_further():
    """Each picture falls at a step of its own, and is not looked at again."""
    seen = []
    model = Linear(0)

    def forward(x):
        seen.append(len(x))
        z = x.flatten(1).mean(1)
        return torch.stack([z * 0, z - 0.55], 1)
    model.forward = forward
    x = torch.stack([torch.full((3, 2, 2), v) for v in (0.9, 0.56, 0.3)])
    x_adv = common.apgd_attack(model, x, torch.ones(3, dtype=torch.long), 0.02, 10)
    assert seen[0] == 3 and seen[1] == 2 and seen[-1] == 1 and len(seen) == 11
    assert (x_adv[1].mean() < 0.55) and (x_adv[0] < 0.9).all() and (x_adv - x).abs().max() < 0.0201


def test_the_learning_rate():
    args = backward_smoothing.parse_args(["--lr", "0.2", "--milestones", "0.5", "0.75"])
    rates = [common.learning_rate(args, p) for p in (0, 0.49, 0.5, 0.74, 0.75, 1)]
    assert rates == pytest.approx([0.2, 0.2, 0.02, 0.02, 0.002, 0.002])
    args.lr_schedule = "cyclic"
    rates = [common.learning_rate(args, p) for p in (0, 0.25, 0.5, 1)]
    assert rates == pytest.approx([0, 0.1, 0.2, 0])
