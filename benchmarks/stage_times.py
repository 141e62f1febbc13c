"""Seconds of every stage of a short run: what a run costs beside its training.

    python benchmarks/stage_times.py [resnet18] [minilm] [fashion] [--steps 8] [--samples 128] [--profile STAGE]

Each network is quantized at W8A8 in a process of its own. Weights are random, but for the example's; only the example
has labels. CPU seconds are those of all threads, so that other processes count little; a second column has wall-clock
time. `--profile` prints where one stage spends its time.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from chosen import chosen
from plain import NETWORKS, settled
from torch import Tensor, nn

from sqakd_fx.pipeline import Silent, run
from sqakd_fx.recipe.resolution import resolve_recipe
from sqakd_fx.source.source import Source, load_source

EXAMPLE = Path(__file__).parent.parent / "examples" / "fashion" / "model.py"
TOKENS = 64


class SentenceEncoder(nn.Module):
    """A BERT of MiniLM's size and the mean of its last hidden states, of length one."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        sizes = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}
        config = BertConfig(**sizes, num_attention_heads=12)
        self.encoder = BertModel(config, add_pooling_layer=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def resnet18(samples: int) -> Source:
    images = torch.randn(samples, *NETWORKS["resnet18"].shape)
    model = settled("resnet18", images[:8])
    return Source(
        "resnet18", "resnet18", model, (images[:2],), {}, list(images.split(8)), None, None
    )


def minilm(samples: int) -> Source:
    torch.manual_seed(0)
    model = SentenceEncoder().eval()
    ids = torch.randint(1000, 30000, (samples, TOKENS))
    lengths = torch.randint(8, TOKENS + 1, (samples, 1))
    mask = (torch.arange(TOKENS) < lengths).long()
    batches = [
        {"input_ids": i, "attention_mask": m}
        for i, m in zip(ids.split(16), mask.split(16), strict=True)
    ]
    example = {name: x[:2] for name, x in batches[0].items()}
    return Source("minilm", "minilm", model, (), example, batches, None, None)


SOURCES: dict[str, Callable[[int], Source]] = {
    "resnet18": resnet18,
    "minilm": minilm,
    "fashion": lambda samples: load_source(str(EXAMPLE)),
}


class Clock(Silent):
    """CPU and wall-clock seconds of each stage; a profile of one of them."""

    def __init__(self, profiled: str | None) -> None:
        self.seconds: dict[str, tuple[float, float]] = {}
        self.name, self.cpu, self.wall = "start", 0.0, time.perf_counter()
        self.profiled, self.profile = profiled, cProfile.Profile()

    def stage(self, name: str, detail: str = "") -> None:
        self.profile.disable()
        cpu, wall = time.process_time(), time.perf_counter()
        before = self.seconds.get(self.name, (0.0, 0.0))
        self.seconds[self.name] = (before[0] + cpu - self.cpu, before[1] + wall - self.wall)
        self.name, self.cpu, self.wall = name, cpu, wall
        if name == self.profiled:
            self.profile.enable()


def measure(name: str, steps: int, samples: int, profiled: str | None) -> None:
    clock = Clock(profiled)
    source = SOURCES[name](samples)
    with tempfile.TemporaryDirectory() as folder:
        run(source, resolve_recipe("w8a8", steps=steps), Path(folder) / "out", observer=clock)
    clock.stage("end")
    rest = {k: v for k, v in clock.seconds.items() if k not in ("start", "distil")}
    print(f"| {name} | CPU s | wall-clock s |\n|---|---|---|")
    for stage, (cpu, wall) in clock.seconds.items():
        print(f"| {stage} | {cpu:.1f} | {wall:.1f} |")
    cpu, wall = (sum(times) for times in zip(*rest.values(), strict=True))
    print(f"| **all but start and distil** | {cpu:.1f} | {wall:.1f} |\n", flush=True)
    if profiled:
        pstats.Stats(clock.profile).sort_stats("cumulative").print_stats(60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", default=list(SOURCES))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--profile", help="a stage: trace, calibrate, check, export, validate, ...")
    options: Any = parser.parse_args()
    names = chosen(SOURCES, options.networks)
    if len(names) == 1:
        measure(names[0], options.steps, options.samples, options.profile)
        return
    for name in names:
        told = [f"--steps={options.steps}", f"--samples={options.samples}"]
        told += [f"--profile={options.profile}"] if options.profile else []
        subprocess.run([sys.executable, __file__, name, *told], check=True)


if __name__ == "__main__":
    main()
