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
    assert common.margin_loss(logits, torch.tensor([0, 2])).item() == (2 - 3) + (5 - 4)


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
    assert common.accuracy(model, x, y)[0] == pytest.approx(100 * 6 / 7)


def test_the_learning_rate():
    args = backward_smoothing.parse_args(["--lr", "0.2", "--milestones", "0.5", "0.75"])
    rates = [common.learning_rate(args, p) for p in (0, 0.49, 0.5, 0.74, 0.75, 1)]
    assert rates == pytest.approx([0.2, 0.2, 0.02, 0.02, 0.002, 0.002])
    args.lr_schedule = "cyclic"
    rates = [common.learning_rate(args, p) for p in (0, 0.25, 0.5, 1)]
    assert rates == pytest.approx([0, 0.1, 0.2, 0])
