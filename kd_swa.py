"""KD-SWA: learned smoothing against robust overfitting (Chen et al., ICLR 2021).

Adversarial training with two teachers of the same architecture, trained on the same images: one
robust, one standard. Both smooth the labels (eq. 1); f are the logits, s is the softmax:

    min_theta  (1 - l1 - l2) CE(f(x + delta), y) + l1 KD(f(x + delta), f_robust(x + delta))
                                                 + l2 KD(f(x + delta), f_standard(x + delta))
    KD(p, t) = -T^2 sum_j s(t / T)_j log s(p / T)_j, T = 2 (the factor T^2 as in the authors' code)

The weights are smoothed, too (eq. 2), once an epoch from the first decay or half time on:

    theta_SWA <- (n theta_SWA + theta) / (n + 1), where n networks have been averaged so far

and BatchNorm statistics are recomputed by a pass over the training images. The averaged network is
evaluated beside the trained one, and saved in swa_best.pt and swa_last.pt.

    python kd_swa.py --eps 8                                CIFAR-10; its tables: docs/papers.md
    python kd_swa.py --eps 8 --kd none --no-swa             its baseline, PGD-AT
    python kd_swa.py --eps 8 --attack trades                Table 2; --norm l2 --eps 128: L2
    python kd_swa.py --eps 8 --iswa                         Table A10

Teachers that are not given (--adv-teacher, --std-teacher) are trained first, the robust one by Fast
AT. Compared with fast_at.py: a PGD attack, labels smoothed by teachers, and averaged weights.
"""

import argparse

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, update_bn

import common


def parse_args(argv=None):
    parser = common.training_parser(__file__, __doc__, arch="preactresnet18-v2", epochs=200,
                                    milestones=[0.25, 0.75])
    share = common.number(float, 0, 1)
    add = parser.add_argument_group("options of KD-SWA").add_argument
    add("--attack", choices=["pgd", "fgsm", "trades"], help="None: pgd; laptop, linf, 1 step: fgsm")
    add("--steps", type=common.number(int, 1), help="attack steps; None: 10, for fgsm 1")
    add("--alpha", type=common.over_255, help="step size, in units of 1/255; None: eps/4, for fgsm "
        "7/8 eps, for l2 15/128 eps")
    add("--beta", type=common.number(float, 0), default=6.0, help="weight of KL, for trades")
    add("--kd", choices=["both", "std", "adv", "none"], default="both", help="which teachers")
    add("--lambda1", type=share, default=0.5, help="weight of the robust teacher")
    add("--lambda2", type=share, default=0.25, help="weight of the standard teacher")
    add("--temperature", type=common.number(float, 1e-3), default=2.0, help="T")
    add("--adv-teacher", metavar="CKPT", help="robust teacher; None: train it first, by Fast AT")
    add("--std-teacher", metavar="CKPT", help="standard teacher; None: train it first")
    add("--teacher-epochs", type=common.number(int, 1), help="of the teachers that are trained "
        "first, with a cyclic learning rate up to --lr, at most 0.1; None: 30, at most --epochs")
    add("--no-swa", action="store_true", help="do not average weights")
    add("--iswa", action="store_true", help="continue training from the average (Table A10)")
    add("--label-smoothing", type=share, default=0.0, help="in cross-entropy (Table 6)")
    add("--tf-kd", action="store_true", help="instead of the teachers, with their joint weight, a "
        "virtual one that gives 99 %% to the label, softened by T = 40 (Yuan et al. 2020; Table 6)")
    args = common.parse(parser, argv)
    small = args.preset == "laptop" and args.norm == "linf" and args.steps in (None, 1)
    args.attack = args.attack or ("fgsm" if small else "pgd")
    args.steps = (1 if args.attack == "fgsm" else 10) if args.steps is None else args.steps
    part = 15 / 128 if args.norm == "l2" else 7 / 8 if args.attack == "fgsm" else 1 / 4
    args.alpha = part * args.eps if args.alpha is None else args.alpha
    args.attack_bn = args.attack_bn or ("eval" if args.attack == "trades" else "train")
    args.teacher_epochs = args.teacher_epochs or min(30, args.epochs)
    if (args.kd == "both" or args.tf_kd) and args.lambda1 + args.lambda2 > 1:
        parser.error("--lambda1 and --lambda2 add up to more than 1")
    if args.iswa and args.no_swa:
        parser.error("--iswa continues from the average that --no-swa leaves out")
    return args


def attack(model, x, y, args):
    """x_adv in [0, 1], within eps of x: gradient ascent on cross-entropy from a random point or,
    for TRADES, on KL(s(f(x)) || s(f(x_adv))) from beside x, as in trades.py."""
    if args.steps == 0:  # the standard teacher's
        return x
    if args.attack != "trades":
        return common.pgd_attack(model, x, y, args.eps, args.alpha, args.steps, norm=args.norm,
                                 bn=args.attack_bn)
    with common.attacking(model, x, args.attack_bn):  # leaves BatchNorm's running statistics alone
        with torch.no_grad():
            target = F.softmax(model(x), dim=1)
        x_adv = x + 0.001 * torch.randn_like(x)
        for _ in range(args.steps):
            x_adv.requires_grad_()
            kl = F.kl_div(F.log_softmax(model(x_adv), dim=1), target, reduction="sum")
            gradient, = torch.autograd.grad(kl, x_adv)
            x_adv = common.step(x_adv, gradient, x, args.eps, args.alpha, args.norm)
    return x_adv


def kd(logits, target, temperature):
    """KD of eq. 1, averaged over the batch; `target` are the teacher's logits, N x C."""
    soft = F.softmax(target / temperature, dim=1)
    return temperature ** 2 * F.cross_entropy(logits / temperature, soft)


def smoothed_loss(model, x, x_adv, y, teachers, args):
    """Eq. 1, averaged over the batch; for TRADES its loss takes the place of cross-entropy.
    `teachers` are triples: weight, temperature, and a function (x_adv, y) -> logits."""
    divergence = 0
    if args.attack == "trades":
        logits, logits_adv = model(x), model(x_adv)
        divergence = F.kl_div(F.log_softmax(logits_adv, dim=1), F.log_softmax(logits, dim=1),
                              log_target=True, reduction="batchmean")
    else:
        logits = logits_adv = model(x_adv)
    loss = F.cross_entropy(logits, y, label_smoothing=args.label_smoothing) + args.beta * divergence
    loss = (1 - sum(weight for weight, _, _ in teachers)) * loss
    for weight, temperature, teacher in teachers:
        with torch.no_grad():
            target = teacher(x_adv, y)
        loss = loss + weight * kd(logits_adv, target, temperature)
    return loss


def find_teachers(args, data, run, model):
    """The teachers that args ask for, as smoothed_loss takes them."""
    if args.tf_kd:
        n = len(data.classes)
        sure = torch.full((n, n), 0.01 / max(1, n - 1), device=args.device).fill_diagonal_(0.99)
        return [(args.lambda1 + args.lambda2, 40, lambda x_adv, y: sure.log()[y])]
    teachers = []
    for kind, weight, path in (("adv", args.lambda1, args.adv_teacher),
                               ("std", args.lambda2, args.std_teacher)):
        if args.kd in ("both", kind):
            path = path or train_teacher(args, kind, run.folder / f"{kind}-teacher")
            teacher, checkpoint = common.load_model(path, args.device)
            if checkpoint["classes"] != data.classes:
                common.fail(f"{path} was trained on other classes")
            teacher.requires_grad_(False).dtype = model.dtype
            teachers.append((weight, args.temperature,
                             lambda x_adv, y, teacher=teacher: teacher(x_adv)))
    return teachers


def train_teacher(args, kind, folder):
    """Trains a teacher in `folder`, unless that is done; returns its best checkpoint."""
    if not (folder / "result.json").exists():
        print(f"first the {kind} teacher:")
        train(argparse.Namespace(**vars(args) | dict(
            attack="pgd", steps=1 if kind == "adv" else 0, alpha=1.25 * args.eps, kd="none",
            no_swa=True, iswa=False, tf_kd=False, label_smoothing=0.0, attack_bn="train",
            lr=min(0.1, args.lr), lr_schedule="cyclic", epochs=args.teacher_epochs,
            keep_epochs=False, out=str(folder), resume=(folder / "args.json").exists())))
    return folder / "best.pt"


def train(args):
    data = common.load_data(args)
    model = common.prepare_model(args, data)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9,
                                weight_decay=args.weight_decay, fused=True)   # one kernel for all
    # fp16 rounds tiny gradients to 0, so the loss is scaled up; in fp32 and bf16 it is not.
    scaler = torch.amp.GradScaler(args.device, enabled=args.precision == "fp16")
    run = common.Run(args, data, model, optimizer, scaler)
    # --- method ---
    averaged = run.keep("averaged", AveragedModel(model))  # mean so far, and its count
    averaged.module.dtype = None  # it is evaluated in fp32
    if averaged.n_averaged > 0:
        run.models["swa_"] = averaged.module
    teachers = find_teachers(args, data, run, model)
    first_decay = min(args.milestones) if args.lr_schedule == "piecewise" else 0.5
    # --- end of method ---
    for epoch in range(run.epoch, args.epochs):
        run.start_epoch()
        total = torch.zeros((), device=args.device)
        for i, (x, y) in enumerate(common.batches(data, args, epoch)):
            lr = common.learning_rate(args, epoch + i / run.steps)
            optimizer.param_groups[0]["lr"] = lr
            # --- method ---
            x_adv = attack(model, x, y, args)
            loss = smoothed_loss(model, x, x_adv, y, teachers, args)
            # --- end of method ---
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            common.average(p.grad for p in model.parameters())  # mean over torchrun's processes
            scaler.step(optimizer)
            scaler.update()
            total += loss.detach()  # not loss.item(), which would wait for the GPU
        # --- method ---
        if not args.no_swa and epoch / args.epochs >= first_decay:
            averaged.update_parameters(model)
            update_bn(common.batches(data, args, epoch), averaged)
            if args.iswa:
                model.load_state_dict(averaged.module.state_dict())
            run.models["swa_"] = averaged.module
        # --- end of method ---
        run.end_epoch(lr, total / run.steps)
    run.finish()


if __name__ == "__main__":
    train(parse_args())
