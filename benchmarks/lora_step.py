"""A training step with LoRA against PEFT's own adapters on the fused attention of the same model, as ratios.

    python benchmarks/lora_step.py [--model ViT-B-32] [--batch 8] [--rounds 3] [--rank 8] [--threads 2]
                                   [--device cpu] [--precision fp32]

Both adapt queries, keys, values and outputs of every attention in both towers, at the same rank and precision, on the
same images and captions, with the same loss and optimiser. (PEFT's adapter of a fused matrix has one thin matrix in for
all three, so it trains fewer numbers at the same rank.) Every round times each way once, in turn, in one process; the
ratios are of the minima and of the medians. "full context" keeps the padding of the captions and so shows what the
split attention alone brings. The words of a caption are those of a short radiology report; `--words` sets how many.
"""
import argparse
import statistics
import time
from copy import deepcopy
from dataclasses import replace

import peft
import torch
from noted import note

from medclip_nb.losses import clip_loss
from medclip_nb.models import add_lora, load_model

WORDS = ("axial t2 weighted slice of the brain at the level of the lateral ventricles with a small ring enhancing "
         "lesion in the left frontal lobe "
         "surrounded by oedema and a mild mass effect on the adjacent sulci no midline shift is seen").split()


def peft_fused(clip, rank):
    "PEFT on `nn.MultiheadAttention`, as its documentation has it"
    model = peft.get_peft_model(deepcopy(clip.model),
                                peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=r".*\.attn"))
    model.print_trainable_parameters()
    return model


def make_step(image_features, text_features, scale, parameters, images, tokens):
    "One step of contrastive training"
    parameters = [p for p in parameters if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def step():
        loss = clip_loss(image_features(images).float(), text_features(tokens).float(), scale.exp())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()
    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options = dict(model="ViT-B-32", batch=8, rounds=3, rank=8, words=20, threads=2, device="cpu", precision="fp32")
    for name, value in options.items(): parser.add_argument(f"--{name}", type=type(value), default=value)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    clip = load_model(args.model, device=args.device, precision=args.precision)
    size = clip.model.visual.image_size
    images = torch.randn(args.batch, 3, *(size if isinstance(size, tuple) else (size, size)), device=clip.device,
                         dtype=clip.dtype)
    captions = [" ".join((WORDS * 3)[i % 7:i % 7 + args.words - i % 5]) for i in range(args.batch)]
    tokens = clip.tokenizer(captions).to(clip.device)
    print(f"longest caption: {max(clip.token_counts(captions))} of {clip.context_length} tokens")

    ours = add_lora(replace(clip, model=deepcopy(clip.model)), args.rank, args.rank, targets=("q", "k", "v", "out"))
    full = replace(ours, model=deepcopy(ours.model))
    theirs = peft_fused(clip, args.rank)
    inner = theirs.base_model.model
    steps = {"medclip_nb": make_step(ours.forward_images, ours.forward_texts, ours.model.logit_scale,
                                     ours.model.parameters(), images, tokens),
             "medclip_nb, full context": make_step(full.model.encode_image, full.model.encode_text,
                                                   full.model.logit_scale, full.model.parameters(), images, tokens),
             "peft, fused attention": make_step(inner.encode_image, inner.encode_text, inner.logit_scale,
                                                theirs.parameters(), images, tokens)}
    first = {name: step() for name, step in steps.items()}
    assert max(first.values()) - min(first.values()) < (1e-4 if args.precision == "fp32"
                                                        else 0.05), f"the ways do not compute the same loss: {first}"

    seconds = {name: [] for name in steps}
    for _ in range(args.rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if clip.device.type == "cuda": torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    base = seconds["medclip_nb"]
    print(f"{'':<26}{'fastest':>10}{'median':>10}{'ratio of fastest':>18}{'of medians':>12}")
    for name, found in seconds.items():
        print(
            f"{name:<26}{min(found):>9.3f}s{statistics.median(found):>9.3f}s{min(found) / min(base):>17.2f}x"
            f"{statistics.median(found) / statistics.median(base):>11.2f}x")
    note("training step with LoRA", "PEFT on fused attention", base, seconds["peft, fused attention"], 1.5,
         size=f"{args.model}, batch {args.batch}, rank {args.rank}")


if __name__ == "__main__": main()
