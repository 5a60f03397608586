#!/usr/bin/env bash
# On a CPU an LSTM has no forward-mode derivative, and an RNN and a GRU have one; without oneDNN the LSTM has one, too.
#
# Guess: torch's recurrent layers are alike here: all of them, or none, can be differentiated forward.
# Seen, torch 2.13.0 (CPU build): torch.func.jvp along the weights works for RNN and GRU and agrees with a central
# difference; for LSTM it raises NotImplementedError, of mkldnn_rnn_layer, which only the LSTM goes through. Inside
# torch.backends.mkldnn.flags(enabled=False) the LSTM's works and agrees as well.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5
"$place/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from torch import nn


def derivative(kind):
    torch.manual_seed(0)
    layer, x = kind(3, 4), torch.randn(5, 2, 3)
    weights = {name: p.detach() for name, p in layer.named_parameters()}

    def output(weights):
        return torch.func.functional_call(layer, weights, (x,))[0]

    step = 1e-2
    there, back = ({k: w + s * step for k, w in weights.items()} for s in (1, -1))
    difference = (output(there) - output(back)) / (2 * step)
    ones = {k: torch.ones_like(w) for k, w in weights.items()}
    return float((torch.func.jvp(output, (weights,), (ones,))[1] - difference).detach().abs().max())


print("torch", torch.__version__)
for kind in (nn.RNN, nn.GRU, nn.LSTM):
    try:
        print(kind.__name__, f"{derivative(kind):.0e} from a central difference")
        assert kind is not nn.LSTM
    except NotImplementedError as error:
        print(kind.__name__, "NotImplementedError:", str(error).splitlines()[0])
        assert kind is nn.LSTM
        assert "mkldnn_rnn_layer" in str(error)
with torch.backends.mkldnn.flags(enabled=False):
    apart = derivative(nn.LSTM)
print("LSTM without oneDNN", f"{apart:.0e} from a central difference")
assert apart < 0.05
PYTHON
