#!/usr/bin/env bash
# torch's Muon, whose formula does not see a gradient's scale, takes a step that is 2% another for a gradient 1.001
# times as large, and for the same gradient sharded over two processes.
#
# Guess: sharded and whole steps agree to 1e-6; a factor that is divided out again changes no more than that.
# Seen, torch 2.13.0: the five Newton-Schulz rounds are bfloat16 products, and their rounding comes to 1 to 3% of the
# step; in float32 the same rounds give 1e-6. A factor other than a power of two rounds every element anew, and so
# does a sum over two shards. The length of the step stays, its direction does not. Adam's steps agree to 1e-7,
# sharded too. Two runs of Muon on one and on two processes are apart from their first step on.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$place/seen.py" <<'PYTHON'
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.optim import Adam, Muon

SHAPES = (8, 4), (64, 32), (256, 256), (512, 128)


def step(made, gradient, **options):
    weight = nn.Parameter(torch.zeros_like(gradient))
    optimizer = made([weight], lr=1.0, weight_decay=0.0, **options)
    weight.grad = gradient
    optimizer.step()
    return weight.detach()


def apart(made, shape, mesh, **options):
    torch.manual_seed(0)
    gradient = torch.randn(shape)
    first = step(made, gradient, **options)
    scaled = step(made, gradient * 1.001, **options)
    doubled = step(made, gradient * 2, **options)
    shards = step(made, distribute_tensor(gradient, mesh, [Shard(0)]), **options).full_tensor()
    return [float((other - first).norm() / first.norm()) for other in (doubled, scaled, shards)]


def process(rank, place):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place}/meeting", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for made, options in ((Muon, {}), (Adam, {"eps": 0.0})):
        sharded = []
        for shape in SHAPES:
            doubled, scaled, shards = apart(made, shape, mesh, **options)
            sharded.append(shards)
            if rank == 0:
                print(
                    f"{made.__name__} {shape}: gradient times 2: {doubled:.0e}, times 1.001: {scaled:.0e},"
                    f" in two shards: {shards:.0e} of the step",
                    flush=True,
                )
            assert doubled < 1e-6
            assert scaled > 2e-3 if made is Muon else scaled < 1e-6
        assert max(sharded) > 5e-3 if made is Muon else max(sharded) < 1e-6
    dist.destroy_process_group()


if __name__ == "__main__":
    print("torch", torch.__version__)
    mp.spawn(process, (sys.argv[1],), nprocs=2)
PYTHON
"$place/venv/bin/python" -W ignore "$place/seen.py" "$place"
