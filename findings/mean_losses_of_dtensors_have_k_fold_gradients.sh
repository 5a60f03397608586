#!/usr/bin/env bash
# The gradient of F.mse_loss over a batch that DTensor shards over k processes is k times too large; the loss is right.
#
# Guess: of a DTensor a loss and its gradient are those of the whole tensor, or an error is raised.
# Seen, torch 2.13.0 on two CPU processes (gloo), and likewise torch 2.14.1: of four rows the loss of mse_loss,
# huber_loss and binary_cross_entropy is right, and every gradient twice what it should be: the backward kernel
# divides by the number of elements of its own shard. (a - b).square().mean(), l1_loss and cross_entropy are right. Of
# three rows, two here and one there, the loss is wrong as well, 5.75 for 4.67, a mean of means, and the gradients are
# 1.5 and 3 times too large, by where a row lies. A mean of an uneven DTensor was mended (pytorch #162692), and a
# weighted nll_loss is known (#185167); of these losses and of the gradient no public issue was found.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$place/losses.py" <<'PYTHON'
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh


def both(loss, rows, mesh):
    """Return a loss of the rows 1, 2, 3, … and its gradient by row: of a plain tensor, and of a sharded one."""
    values = torch.arange(1.0, rows + 1)[:, None] * torch.ones(2)
    for shard in (lambda tensor: tensor, lambda tensor: distribute_tensor(tensor, mesh, [Shard(0)])):
        prediction = shard(values.clone()).requires_grad_()
        result = loss(prediction, shard(torch.full((rows, 2), 0.25)))
        result.backward()
        whole = [each.full_tensor() if hasattr(each, "full_tensor") else each for each in (result, prediction.grad)]
        yield whole[0].item(), whole[1][:, 0]


def work(rank, place):
    dist.init_process_group("gloo", init_method=f"file://{place}/meet", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    losses = {
        "mse_loss": F.mse_loss,
        "huber_loss": F.huber_loss,
        "binary_cross_entropy": lambda a, b: F.binary_cross_entropy(a.sigmoid(), b),
        "l1_loss": F.l1_loss,
        "by hand": lambda a, b: (a - b).square().mean(),
    }
    for rows, factors in ((4, [2, 2, 2, 2]), (3, [1.5, 1.5, 3])):
        for name, loss in losses.items():
            (plain, gradient), (sharded, of_shards) = both(loss, rows, mesh)
            ratio = of_shards / gradient
            if rank == 0:
                print(f"{rows} rows {name:20} {plain:.4f}, sharded {sharded:.4f}; gradients times {ratio.tolist()}")
            right = name in ("l1_loss", "by hand")
            torch.testing.assert_close(ratio, torch.ones(rows) if right else torch.tensor(factors, dtype=torch.float32))
            assert (abs(sharded - plain) < 1e-5 * plain) == (right or rows == 4)
    dist.destroy_process_group()


if __name__ == "__main__":
    import sys

    print("torch", torch.__version__)
    torch.multiprocessing.spawn(work, (sys.argv[1],), nprocs=2)
PYTHON
"$place/venv/bin/python" -W ignore "$place/losses.py" "$place"
