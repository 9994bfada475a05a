"""What one training step of MagNet costs at full size, and what Mask Grounding and activation checkpointing change. Run by hand:

    python tests/bench/bench_magnet_step.py [--threads 2] [--repeats 3] [--batch 1] [--out data/results/bench/magnet_step.json]

A step is forward, losses, backward and AdamW, on noise at 480 pixels. The variants share one network and take turns within one
run. "cpu" is the seconds of all threads together; "kept" is what autograd keeps for the way back, weights not counted; "peak" is
the most that the process holds during a step, weights, gradients and AdamW's averages too, and "climb" by how much that is more
than before the step. The predictor has the paper's size; its words are a vocabulary of 30,522.
"""
import torch
from benching import keep, machine, options, peak_memory, rounds, saved_bytes, spread

from ris_nb.contract import Batch
from ris_nb.data.tokenizer import SPECIAL
from ris_nb.models.magnet import MagNet
from ris_nb.models.mask_grounding import Grounded

WORDS = 30522


def make_batch(size):
    mask = torch.zeros(size, 480, 480, dtype=torch.bool)
    mask[:, 100:300, 150:350] = True
    return Batch(torch.randn(size, 3, 480, 480), torch.randint(len(SPECIAL), WORDS, (size, 20)),
                 torch.arange(20).expand(size, -1) < 8, mask=mask)


def main():
    args = options(__doc__, "magnet_step.json", repeats=3, batch=1).parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = MagNet(vocabulary=[*SPECIAL, *(f"w{i}" for i in range(WORDS - len(SPECIAL)))]).train()
    grounded, batch = Grounded(model).train(), make_batch(args.batch)
    optimizer = torch.optim.AdamW([p for p in grounded.parameters() if p.requires_grad], lr=1e-5, fused=True)
    for parameter in grounded.parameters():
        parameter.grad = torch.zeros_like(parameter)  # all there from the first step on, as AdamW's averages are after it

    def forward(pupil, checkpointing):
        model.set_grad_checkpointing(checkpointing)
        return pupil.losses(pupil(batch), batch)

    def step(*variant):
        losses = forward(*variant)
        sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # gradients stay where they are, so that "climb" is of activations alone
        assert all(torch.isfinite(value) for value in losses.values())

    variants = {"MagNet": (model, False), "with Mask Grounding": (grounded, False), "with both, checkpointed": (grounded, True)}
    memory = {}
    for name, variant in variants.items():  # this also warms the caches
        step(*variant)
        kept, _ = saved_bytes(lambda: forward(*variant), grounded.parameters())
        before, peak = peak_memory(lambda: step(*variant))
        memory[name] = {"kept, GB": kept / 1e9, "climb, GB": (peak - before) / 1e9, "peak, GB": peak / 1e9}
    clock, cpu = rounds({name: lambda variant=variant: step(*variant) for name, variant in variants.items()}, args.repeats)
    keep({"machine": machine(args.threads), "batch": args.batch, "repeats": args.repeats,
          "parameters": {"MagNet": sum(p.numel() for p in model.parameters()),
                         "predictor": sum(p.numel() for p in grounded.predictor.parameters())},
          "variants": {name: {**spread(clock[name], cpu[name]), **memory[name]} for name in variants},
          "Mask Grounding costs, of a step": {kind: [b / a - 1 for a, b in zip(seconds["MagNet"], seconds["with Mask Grounding"])]
                                              for kind, seconds in (("clock", clock), ("cpu", cpu))}}, args.out)


if __name__ == "__main__":
    main()
