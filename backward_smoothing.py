"""Backward Smoothing: efficient robust training (Chen et al., AAAI 2022).

Sections, equations and tables are numbered as in its submission to ICLR 2021. The objective is
that of TRADES; f are the logits, s is the softmax:

    min_theta  CE(f(x), y) + beta KL(s(f(x)) || s(f(x_adv)))

What is new is where the single attack step starts (Algorithm 1). Random noise on the *input* must
stay in the eps-ball, and smooths the loss too little. So add noise to the *output*, and go backward
to an input that produces it:

    psi   ~ U(-1, 1)^C
    xi    = argmin over the ball of KL(s(f(x) + gamma psi) || s(f(x + xi)))     (4.4), one step down
    delta = argmax over the ball of KL(s(f(x)) || s(f(x + xi + delta)))         (4.5), one step up
    theta <- theta - lr grad_theta [CE(f(x), y) + beta KL(s(f(x)) || s(f(x + xi + delta)))]

As in the authors' code, xi + delta stays in the ball as well.

    python backward_smoothing.py --eps 8                        CIFAR-10; Table 2: --eps 7.905
    python backward_smoothing.py --eps 8 --dataset shapes       1 to 3 minutes on 2 cores

Compared with fast_at.py: the attack starts from a backward-smoothed point instead of a random one
and ascends KL instead of cross-entropy, with BatchNorm in eval mode; clean images are in the loss.
"""

import torch
import torch.nn.functional as F

import common


def parse_args(argv=None):
    parser = common.training_parser(__file__, __doc__, epochs=100, attack_bn="eval")
    add = parser.add_argument_group("options of Backward Smoothing").add_argument
    add("--gamma", type=common.number(float, 0), default=1.0, help="size of the output noise")
    add("--beta", type=common.number(float, 0), default=10.0, help="weight of KL")
    add("--alpha", type=common.over_255, help="size of both steps, in units of 1/255; None: eps")
    add("--random-points", type=common.number(int, 1), default=1, metavar="K",
        help="draws of psi to average over (Table 12)")
    add("--alone", action="store_true", help="leave out the step up (Table 10)")
    add("--objective", choices=["kl", "ce"], default="kl",
        help="ce: cross-entropy in the step up, and as the whole loss (section 5.4)")
    args = common.parse(parser, argv)
    args.alpha = args.eps if args.alpha is None else args.alpha
    return args


def kl(logits, target):
    """KL(target || s(logits)), summed over the batch: logits N x C, target N x C probabilities."""
    return F.kl_div(F.log_softmax(logits, dim=1), target, reduction="sum")


def backward_smoothing(model, x, eps, alpha, gamma=1.0, random_points=1, alone=False, y=None,
                       norm="linf", bn="eval"):
    """Algorithm 1, lines 5 and 6. Returns x_adv in [0, 1], within eps of x. The step up ascends
    cross-entropy if labels y are given, else KL."""
    with common.attacking(model, x, bn):  # leaves BatchNorm's running statistics alone
        # (4.4) At xi = 0 the gradient is linear in the target: averaging K draws costs nothing.
        start = x.detach().clone().requires_grad_()
        logits = model(start)
        clean = logits.detach()
        psi = torch.empty(random_points, *clean.shape, device=x.device).uniform_(-1, 1)
        target = F.softmax(clean + gamma * psi, dim=-1).mean(0)
        loss = kl(logits, target)  # summed, as the gradient of a mean underflows in fp16
        gradient, = torch.autograd.grad(loss, start)
        x_adv = common.step(x, gradient, x, eps, -alpha, norm)
        if alone:
            return x_adv

        # (4.5) One step up from there.
        x_adv.requires_grad_()
        logits = model(x_adv)
        loss = (kl(logits, F.softmax(clean, dim=1)) if y is None else
                F.cross_entropy(logits, y, reduction="sum"))
        gradient, = torch.autograd.grad(loss, x_adv)
        return common.step(x_adv, gradient, x, eps, alpha, norm)


def smoothing_loss(model, x, x_adv, y, beta):
    """Algorithm 1, line 7: CE(f(x), y) + beta KL(s(f(x)) || s(f(x_adv))), averaged over the batch.
    The gradient flows through both outputs; log_target keeps it finite where a probability is 0."""
    logits, logits_adv = model(x), model(x_adv)
    divergence = F.kl_div(F.log_softmax(logits_adv, dim=1), F.log_softmax(logits, dim=1),
                          log_target=True, reduction="batchmean")
    return F.cross_entropy(logits, y) + beta * divergence


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
            ce = args.objective == "ce"
            x_adv = backward_smoothing(model, x, args.eps, args.alpha, args.gamma,
                                       args.random_points, args.alone, y if ce else None,
                                       args.norm, args.attack_bn)
            loss = (F.cross_entropy(model(x_adv), y) if ce else
                    smoothing_loss(model, x, x_adv, y, args.beta))
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
