"""What staging costs: all exits without heads against the untouched model, interleaved in one process, paired ratios.

python benchmarks/overhead.py            about 4 minutes
python benchmarks/overhead.py --smoke    seconds, to see that it runs
"""

from __future__ import annotations

import argparse
import time

import torch
from common import median_interval, write_results

from impatient import attach_exits, load_model
from impatient.networks.stages import Walk

CUTS = {
    "torchvision:resnet50": [
        f"layer{stage}.{block}" for stage, blocks in enumerate((3, 4, 6, 3), 1) for block in range(blocks)
    ],
    "torchvision:vit_b_16": [f"encoder.layers.encoder_layer_{layer}" for layer in range(12)],
}


def cut_everywhere(spec: str, size: int) -> tuple[torch.nn.Module, dict[tuple[int, int], int], int]:
    """A model and a cut after every one of its blocks."""
    torch.manual_seed(0)
    model = load_model(spec)
    network = attach_exits(model, example=torch.zeros(1, 3, size, size), after=CUTS[spec]).eval()
    return model.eval(), network._cut_map(), len(network.cuts)


def measure(spec: str, size: int, threads: int, repeats: int) -> dict[str, object]:
    torch.set_num_threads(threads)
    model, cuts, number = cut_everywhere(spec, size)
    heads = [None] * (number + 1)
    x = torch.randn(1, 3, size, size)

    def plain() -> float:
        begin = time.perf_counter()
        model(x)
        return time.perf_counter() - begin

    def staged() -> float:
        begin = time.perf_counter()
        for _ in Walk(model, x, cuts, heads):
            pass
        return time.perf_counter() - begin

    ratios, same, differences = [], [], []
    with torch.inference_mode():
        exact = torch.equal(list(Walk(model, x, cuts, heads))[-1].output(), model(x))
        for repeat in range(repeats + 10):
            # plain, staged, plain: the A/A ratio comes from the same moment as the A/B one
            first, second, third = (plain(), staged(), plain()) if repeat % 2 else (staged(), plain(), plain())
            a, b = (first, second) if repeat % 2 else (second, first)
            if repeat >= 10:
                ratios.append(b / a)
                same.append(third / a)
                differences.append((b - a) / number * 1e6)
    middle, low, high = median_interval(ratios)
    again, again_low, again_high = median_interval(same)
    per_cut, per_cut_low, per_cut_high = median_interval(differences)
    return {
        "model": spec, "pixels": size, "threads": threads, "cuts": number, "n": repeats, "output equal": exact,
        "staged / untouched": f"{middle:.4f}", "95 % interval": f"{low:.4f} to {high:.4f}",
        "untouched / untouched": f"{again:.4f}", "its interval": f"{again_low:.4f} to {again_high:.4f}",
        "us per cut": f"{per_cut:.1f} ({per_cut_low:.1f} to {per_cut_high:.1f})",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true")
    smoke = parser.parse_args().smoke
    cases = [(spec, size, threads) for spec, sizes in zip(CUTS, ((224, 64), (224,)), strict=True)
             for size in sizes for threads in (1, 2)]  # fmt: skip
    rows = []
    for spec, size, threads in cases[:1] if smoke else cases:
        rows.append(measure(spec, size, threads, 3 if smoke else 200 if size == 64 else 60))
        print(rows[-1], flush=True)
    if not smoke:
        write_results(
            "overhead", "Overhead of staging", __doc__.split("\n")[0] + " Batch 1, inference mode, random weights.", rows
        )


if __name__ == "__main__":
    main()
