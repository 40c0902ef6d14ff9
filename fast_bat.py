"""Fast-BAT: fast adversarial training as bi-level optimisation (Zhang et al., ICML 2022).

The attack is itself the solution of an optimisation problem, linearised at a point z of the set C
of allowed perturbations (eq. 7; numbers are those of the submission to ICLR 2022), with
l_atk = -CE and l_tr = CE:

    min_theta  CE(theta, delta*(theta))
    delta*(theta) = argmin over C of <delta - z, grad l_atk(theta, z)> + lmbda/2 |delta - z|^2
                  = P(z + (1/lmbda) grad_delta CE(theta, z))                                    (8)

So delta* depends on theta, and the chain rule adds a term that Fast AT ignores. Where (8) is
strictly inside its bounds, d delta*/d theta = (1/lmbda) grad_theta grad_delta CE(theta, z); on a
bound it is 0; the 0/1 mask H_C says which. The paper's (11) takes this derivative at delta* instead
of z. We follow the derivative of (8) for fixed z, and the authors' code. (11) has l_atk = -CE,
hence its minus signs; they cancel. With weight alpha2, relative to alpha1, for the new term:

    z     <- P(delta0 + (1/lmbda) grad_delta CE(theta, delta0)), delta0 ~ U(-eps, eps)
    delta <- P(z + (1/lmbda) grad_delta CE(theta, z))
    v     <- H_C grad_delta CE(theta, delta)
    theta <- theta - alpha1 grad_theta CE(theta, delta)
                   - (alpha1 alpha2/lmbda) grad_theta <grad_delta CE(theta, z), v>

    python fast_bat.py --eps 8                              Table 2: CIFAR-10, PreActResNet-18
    python fast_bat.py --eps 16                             with a larger lmbda
    python fast_bat.py --eps 8 --hessian-aware              Table A4
    python fast_bat.py --eps 16 --lmbda 0.17 --linearization corner       Table A3

Compared with fast_at.py: the attack step follows the gradient instead of its sign, from a better
point, and the update also accounts for how the weights move the attack.
"""

import torch
import torch.nn.functional as F

import common


def parse_args(argv=None):
    parser = common.training_parser(__file__, __doc__, arch="preactresnet18", epochs=20, lr=0.2,
                                    lr_schedule="cyclic", attack_bn="train")
    add = parser.add_argument_group("options of Fast-BAT").add_argument
    add("--linearization", choices=["pgd-nosign", "pgd", "uniform", "corner"],
        default="pgd-nosign", help="z: one step from a random point, along the gradient or its "
        "sign; the random point itself; or a random corner (Table A3)")
    add("--lmbda", type=common.number(float, 1e-6), help="weight of |delta - z|^2 / 2; None: "
        "255/5000 up to eps 8, 255/2000 above")
    add("--alpha2", type=common.number(float, 0), help="weight of the implicit gradient, relative "
        "to that of the other one; None: 0.1 lmbda")
    add("--hessian-aware", action="store_true", help="keep the second derivative of l_atk")
    args = common.parse(parser, argv)
    if args.lmbda is None:
        args.lmbda = 255 / (5000 if args.eps <= 8 / 255 else 2000)
    args.alpha2 = 0.1 * args.lmbda if args.alpha2 is None else args.alpha2
    if args.norm != "linf":
        parser.error("argument --norm: Fast-BAT is defined for linf only")
    if args.compile:
        parser.error("Fast-BAT differentiates twice, which --compile does not support")
    return args


def linearization_point(model, x, y, low, high, eps, lmbda, linearization):
    """x + z (Remark 2 and Table A3), within the bounds low and high."""
    corner = linearization == "corner"
    point = x + eps * torch.randn_like(x).sign() if corner else common.random_start(x, eps)
    if linearization in ("pgd", "pgd-nosign"):
        point.requires_grad_()
        loss = F.cross_entropy(model(point), y, reduction="sum")  # a mean would shrink the step
        gradient, = torch.autograd.grad(loss, point)
        move = gradient / lmbda if linearization == "pgd-nosign" else 0.5 * eps * gradient.sign()
        point = point.detach() + move
    return point.clamp(low, high)


def fast_bat(model, x, y, eps, lmbda, linearization="pgd-nosign", bn="train"):
    """Eq. 8. Returns x_adv = x + delta*; H_C, True where delta* is strictly inside its bounds; and
    grad_delta CE(theta, z), which can be differentiated with respect to the weights."""
    x = x.detach()
    low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    with common.attacking(model, x, bn):  # leaves BatchNorm's running statistics alone
        z = linearization_point(model, x, y, low, high, eps, lmbda, linearization).requires_grad_()
        # With "eval": copies for the graph, as the training step changes the statistics in place.
        for module in model.modules():
            if getattr(module, "running_mean", None) is not None:
                module.running_mean = module.running_mean.clone()
                module.running_var = module.running_var.clone()
        loss = F.cross_entropy(model(z), y, reduction="sum")
        gradient, = torch.autograd.grad(loss, z, create_graph=True)
    x_adv = (z + gradient / lmbda).detach().clamp(low, high)
    return x_adv, (low < x_adv) & (x_adv < high), gradient


def curvature_step(model, x_adv, y, v, inside, lmbda, bn="train"):
    """v of the Hessian-aware form, and the gradient that goes with it, both at delta*.

    With H the second derivative of l_atk, eq. 21 has (lmbda + H)^-1 in place of 1/lmbda; to first
    order that is (1 - H/lmbda)/lmbda, which takes one Hessian-vector product.
    """
    with common.attacking(model, x_adv, bn):
        point = x_adv.detach().requires_grad_()
        loss = F.cross_entropy(model(point), y, reduction="sum")
        gradient, = torch.autograd.grad(loss, point, create_graph=True)
        product, = torch.autograd.grad((gradient * v).sum(), point, retain_graph=True)
    return v + inside * product / lmbda, gradient


def bilevel_loss(model, x_adv, y, inside, gradient, lmbda, alpha2, hessian_aware=False,
                 bn="train"):
    """Cross-entropy at delta*, averaged over the batch, plus a term of value 0 with the implicit
    gradient, so that the gradient of the sum is the whole update of eq. 11."""
    x_adv = x_adv.detach().requires_grad_()
    loss = F.cross_entropy(model(x_adv), y)
    v, = torch.autograd.grad(len(x_adv) * loss, x_adv, retain_graph=True)  # summed, for fp16
    v = inside * v / len(x_adv)
    if hessian_aware:
        v, gradient = curvature_step(model, x_adv, y, v, inside, lmbda, bn)
    implicit = (gradient * v).sum()
    return loss + alpha2 / lmbda * (implicit - implicit.detach())


def train(args):
    data = common.load_data(args)
    model = common.prepare_model(args, data)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9,
                                weight_decay=args.weight_decay, fused=True)   # one kernel for all
    # fp16 rounds tiny gradients to 0, so the loss is scaled up; in fp32 and bf16 it is not.
    scaler = torch.amp.GradScaler(args.device, enabled=args.precision == "fp16")
    run = common.Run(args, data, model, optimizer, scaler)
    for epoch in range(run.epoch, args.epochs):
        run.start_epoch()
        total = torch.zeros((), device=args.device)
        for i, (x, y) in enumerate(common.batches(data, args, epoch)):
            lr = common.learning_rate(args, epoch + i / run.steps)
            optimizer.param_groups[0]["lr"] = lr
            # --- method ---
            x_adv, inside, gradient = fast_bat(model, x, y, args.eps, args.lmbda,
                                               args.linearization, args.attack_bn)
            loss = bilevel_loss(model, x_adv, y, inside, gradient, args.lmbda, args.alpha2,
                                args.hessian_aware, args.attack_bn)
            # --- end of method ---
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            common.average(p.grad for p in model.parameters())  # mean over torchrun's processes
            scaler.step(optimizer)
            scaler.update()
            total += loss.detach()  # not loss.item(), which would wait for the GPU
        run.end_epoch(lr, total / run.steps)
    run.finish()


if __name__ == "__main__":
    train(parse_args())
