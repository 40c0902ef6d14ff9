"""Fast-BAT: fast adversarial training as bi-level optimisation (Zhang et al., ICML 2022).

Objective (eq. 7): the attack is itself the solution of a problem, linearised at a point z of the
box C of allowed perturbations, with l_atk = -CE and l_tr = CE:

    min_theta  CE(theta, delta*(theta))
    delta*(theta) = argmin over C of <delta - z, grad l_atk(theta, z)> + lmbda/2 |delta - z|^2
                  = P(z + (1/lmbda) grad_delta CE(theta, z))                                    (8)

So delta* depends on theta, and the chain rule adds a term that Fast AT leaves out. Where (8) lies
inside its bounds, d delta*/d theta = (1/lmbda) grad_theta grad_delta CE(theta, z); on a bound it
is 0; H_C is the 0/1 mask of the former. The paper's (11) writes l_atk = -CE, hence its minus signs;
they cancel, and the update, with rate alpha2 for the new term, is

    z     <- P(delta0 + (1/lmbda) grad_delta CE(theta, delta0)), delta0 ~ U(-eps, eps)
    delta <- P(z + (1/lmbda) grad_delta CE(theta, z))
    v     <- H_C grad_delta CE(theta, delta)
    theta <- theta - alpha1 grad_theta CE(theta, delta)
                   - (alpha2/lmbda) grad_theta <grad_delta CE(theta, z), v>

    python fast_bat.py --eps 8                              Table 2: CIFAR-10, PreActResNet-18
    python fast_bat.py --eps 16                             with a larger lmbda
    python fast_bat.py --eps 8 --hessian-aware              Table A4
    python fast_bat.py --eps 8 --linearization corner       Table A3

Compared with fast_at.py: the step follows the gradient instead of its sign, from a better point,
and the update also knows how the weights move the attack.
"""

import numpy as np
import torch
import torch.nn.functional as F

import common
from bookkeeping import Run
from data import batches, load_data


def parse_args(argv=None):
    parser = common.TrainingParser(__file__, __doc__, arch="preactresnet18", epochs=20, lr=0.2,
                                   lr_schedule="cyclic", attack_bn="train")
    add = parser.add_argument_group("options of Fast-BAT").add_argument
    add("--linearization", choices=["pgd-nosign", "pgd", "uniform", "corner"],
        default="pgd-nosign", help="where z comes from: one step from a random point, by the "
        "gradient or by its sign; that point itself; or a random corner (Table A3)")
    add("--lmbda", type=common.number(float, 1e-6), help="weight of |delta - z|^2; None: 255/5000 "
        "up to eps 8, 255/2000 at eps 16, between them by interpolation")
    add("--alpha2", type=common.number(float, 0), help="rate of the implicit gradient, in parts of "
        "the learning rate; None: 0.1 lmbda")
    add("--hessian-aware", action="store_true", help="keep the second derivative of l_atk")
    args = parser.parse_args(argv)
    args.lmbda = args.lmbda or 255 / np.interp(args.eps * 255, (8, 16), (5000, 2000)).item()
    args.alpha2 = 0.1 * args.lmbda if args.alpha2 is None else args.alpha2
    if args.norm != "linf":
        parser.error("argument --norm: Fast-BAT is defined for linf, a box, only")
    if args.compile:
        common.say("Fast-BAT differentiates twice, which torch.compile cannot: running eager")
        args.compile = False
    return args


def linearization_point(model, x, y, low, high, eps, lmbda, linearization):
    """x + z, with z as Remark 2 and Table A3 have it, within the bounds low and high."""
    corner = linearization == "corner"
    point = x + eps * torch.randn_like(x).sign() if corner else common.random_start(x, eps)
    if linearization in ("pgd", "pgd-nosign"):
        point.requires_grad_()
        gradient, = torch.autograd.grad(common.cross_entropy(model(point), y), point)
        move = gradient / lmbda if linearization == "pgd-nosign" else 0.5 * eps * gradient.sign()
        point = point.detach() + move
    return point.clamp(low, high)


def fast_bat(model, x, y, eps, lmbda, linearization="pgd-nosign", bn="train"):
    """Eq. 8: x N x 3 x H x W in [0, 1] -> x_adv = x + delta*, within eps of x and in [0, 1]; H_C,
    True where delta* is strictly inside its bounds; and grad_delta CE(theta, z), with its graph.

    eps in units of [0, 1]. Parameters, their gradients and BatchNorm statistics stay as they are.
    ValueError for bad x.
    """
    low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    with common.attacking(model, x, bn):
        z = linearization_point(model, x, y, low, high, eps, lmbda, linearization).requires_grad_()
        rise = common.cross_entropy(model(z), y)
        gradient, = torch.autograd.grad(rise, z, create_graph=True)
    x_adv = (z + gradient / lmbda).detach().clamp(low, high)
    return x_adv, (low < x_adv) & (x_adv < high), gradient


def curvature_step(model, x_adv, y, v, inside, lmbda, bn="train"):
    """v of the Hessian-aware form, and the gradient that it goes with, both at delta*.

    With H the second derivative of l_atk the inverse of eq. 21 is (lmbda + H)^-1, in place of
    1/lmbda; to first order it is (1 - H/lmbda)/lmbda: one Hessian-vector product.
    """
    with common.attacking(model, x_adv, bn):
        point = x_adv.detach().requires_grad_()
        rise = common.cross_entropy(model(point), y)
        gradient, = torch.autograd.grad(rise, point, create_graph=True)
        product, = torch.autograd.grad((gradient * v).sum(), point, retain_graph=True)
    return v + inside * product / lmbda, gradient


def training_loss(model, x, y, args):
    """Cross-entropy at delta*, the mean over the batch; a scalar tensor. Its gradient is the whole
    update of eq. 11: the implicit term adds nothing to the value."""
    x_adv, inside, gradient = fast_bat(model, x, y, args.eps, args.lmbda, args.linearization,
                                       args.attack_bn)
    x_adv.requires_grad_()
    loss = F.cross_entropy(model(x_adv), y)
    v, = torch.autograd.grad(len(x) * loss, x_adv, retain_graph=True)  # summed, for fp16
    v = inside * v / len(x)
    if args.hessian_aware:
        v, gradient = curvature_step(model, x_adv, y, v, inside, args.lmbda, args.attack_bn)
    implicit = (gradient * v).sum()
    return loss + args.alpha2 / args.lmbda * (implicit - implicit.detach())


def train(args):
    data = load_data(args)
    model = common.prepare_model(args, data)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9,
                                weight_decay=args.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(args.device.split(":")[0], enabled=args.precision == "fp16")
    run = Run(args, data, model, optimizer, scaler)
    for epoch in range(run.epoch, args.epochs):
        run.start_epoch()
        total = torch.zeros((), device=args.device)
        for step, (x, y) in enumerate(batches(data, args, epoch)):
            lr = common.learning_rate(args, (epoch + step / run.steps) / args.epochs)
            optimizer.param_groups[0]["lr"] = lr
            # --- method ---
            loss = training_loss(model, x, y, args)
            # --- end of method ---
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            common.average(p.grad for p in model.parameters())
            scaler.step(optimizer)
            scaler.update()
            total += loss.detach()
            run.progress(epoch * run.steps + step + 1)
        run.end_epoch(lr, total / run.steps)
    run.finish()


if __name__ == "__main__":
    common.main(parse_args, train)
