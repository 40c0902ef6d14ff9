"""Fast AT (Wong et al., ICLR 2020), and its relatives: PGD-AT, N-FGSM, GradAlign, Fast AT+.

Adversarial training (Madry et al. 2018) minimises the loss under the worst perturbation; f are the
logits, and P projects onto the eps-ball and [0, 1]:

    min_theta  max over the eps-ball of CE(f(x + delta), y)

PGD-AT approximates the maximum by many gradient steps. Fast AT takes one, from a random point:

    delta <- U(-eps, eps)
    delta <- P(delta + alpha sign grad_delta CE(f(x + delta), y)), alpha = 1.25 eps
    theta <- theta - lr grad_theta CE(f(x + delta), y)

A single step can fail: the network learns to curve the loss so that the step misses its maximum,
and PGD accuracy drops to 0 within a few epochs (catastrophic overfitting). Three remedies:

    N-FGSM: noise from U(-2 eps, 2 eps), a step of alpha = eps, and no projection onto the ball
    GradAlign: add lambda (1 - cos(g(x), g(P(x + eta)))), g = grad_x CE, eta ~ U(-eps, eps)
    Fast AT+: when PGD accuracy on held-out images collapses, use PGD-10 until it has recovered

    python fast_at.py --eps 8                                 Fast AT
    python fast_at.py --eps 8 --init zero                     plain FGSM
    python fast_at.py --eps 8 --init noise                    N-FGSM (de Jorge et al. 2022)
    python fast_at.py --eps 8 --steps 2                       PGD-2-AT; --steps 10: PGD-AT
    python fast_at.py --eps 8 --init zero --grad-align 0.2    GradAlign; 2.0 for eps 16
    python fast_at.py --eps 8 --recover                       Fast AT+
    python fast_at.py --steps 0                               standard training

The other scripts say how they differ from this one.
"""

import torch
import torch.nn.functional as F

import common


def parse_args(argv=None):
    parser = common.training_parser(__file__, __doc__, epochs=100, attack_bn="train")
    add = parser.add_argument_group("options of Fast AT").add_argument
    add("--steps", type=common.number(int, 0), default=1, help="attack steps; 0: no attack")
    add("--alpha", type=common.over_255, help="step size, in units of 1/255; None: 1.25 eps for "
        "one step (N-FGSM: eps), eps/2 for two, eps/4 for more")
    add("--init", choices=["uniform", "zero", "noise"], default="uniform",
        help="where the attack starts")
    add("--grad-align", type=common.number(float, 0), default=0.0, metavar="LAMBDA",
        help="weight of GradAlign (Andriushchenko & Flammarion 2020)")
    add("--recover", action="store_true", help="Fast AT+ (Li et al. 2020)")
    args = common.parse(parser, argv)
    if args.alpha is None:
        one = 1 if args.init == "noise" else 1.25
        args.alpha = {1: one, 2: 0.5}.get(args.steps, 0.25) * args.eps
    if args.init == "noise" and (args.norm, args.steps) != ("linf", 1):
        parser.error("--init noise is N-FGSM, which takes one step in the norm linf")
    if args.grad_align and args.compile:
        parser.error("--grad-align differentiates twice, which --compile does not support")
    return args


def fast_at(model, x, y, eps, alpha, steps=1, init="uniform", norm="linf", bn="train"):
    """`steps` steps of gradient ascent on cross-entropy, of size alpha. Returns x_adv in [0, 1],
    within eps of x except with init="noise". Without steps, x itself."""
    if init == "noise":
        return n_fgsm(model, x, y, eps, alpha, bn)
    x_adv = common.random_start(x, eps, norm) if steps and init == "uniform" else x
    with common.attacking(model, x, bn):  # leaves BatchNorm's running statistics alone
        for _ in range(steps):
            x_adv = x_adv.detach().requires_grad_()
            loss = F.cross_entropy(model(x_adv), y, reduction="sum")
            gradient, = torch.autograd.grad(loss, x_adv)  # that of a mean underflows in fp16
            x_adv = common.step(x_adv, gradient, x, eps, alpha, norm)
    return x_adv


def n_fgsm(model, x, y, eps, alpha, bn="train"):
    """N-FGSM's x_adv, up to 2 eps + alpha away from x: one signed step from a noisy image."""
    with common.attacking(model, x, bn):
        noisy = common.random_start(x, 2 * eps).requires_grad_()
        loss = F.cross_entropy(model(noisy), y, reduction="sum")
        gradient, = torch.autograd.grad(loss, noisy)
    return (noisy + alpha * gradient.sign()).detach().clamp(0, 1)


def misalignment(model, x, y, eps, norm="linf", bn="train"):
    """GradAlign's 1 - cos(g(x), g(P(x + eta))), averaged over the batch. Only the latter is
    differentiated with respect to the weights, as in the authors' code."""
    with common.attacking(model, x, bn):
        clean = x.detach().clone().requires_grad_()
        noisy = common.random_start(x, eps, norm).requires_grad_()
        loss = F.cross_entropy(model(clean), y, reduction="sum")
        target, = torch.autograd.grad(loss, clean)
        loss = F.cross_entropy(model(noisy), y, reduction="sum")
        gradient, = torch.autograd.grad(loss, noisy, create_graph=True)
    both = target.flatten(1), gradient.flatten(1)
    sizes = [g.detach().abs().amax(1, keepdim=True) for g in both]
    seen = (torch.cat(sizes, 1) > 1e-30).all(1)  # where one of them is 0 there is no angle
    # Scaled, as the squares of a sure network's small gradients would be rounded to 0.
    cosine = F.cosine_similarity(*(g / size.clamp(min=1e-30) for g, size in zip(both, sizes)))
    return (seen * (1 - cosine)).sum() / seen.sum().clamp(min=1)


def has_collapsed(model, data, run):
    """Is PGD-10 accuracy on 128 held-out images over 10 points below that of the best epoch or,
    where that is under 20 %, below half of it?"""
    x, y = (part[:128] for part in data.val)
    best = max((row["val_pgd"] for row in run.rows), default=0)
    _, now = common.accuracy(model, x, y, run.args.eps, 10, run.args.norm)
    return now < max(best - 10, best / 2)


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
            if i % (run.steps // 10 + 1) == 0:  # about ten times per epoch
                recover = args.recover and has_collapsed(model, data, run)
            if recover:
                x_adv = fast_at(model, x, y, args.eps, args.eps / 4, 10, "uniform", args.norm,
                                args.attack_bn)
            else:
                x_adv = fast_at(model, x, y, args.eps, args.alpha, args.steps, args.init,
                                args.norm, args.attack_bn)
            loss = F.cross_entropy(model(x_adv), y)
            if args.grad_align:
                loss = loss + args.grad_align * misalignment(model, x, y, args.eps, args.norm,
                                                             args.attack_bn)
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
