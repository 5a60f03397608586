"""EBC in other people's trainers: `lightning` and `transformers`, a callback each, called `EBC`.

Each needs the package of its name, which `pip install 'ebc-lab[NAME]'` brings along. A loop of one's own,
with Accelerate or without, needs neither: `ebc_lab.ebc.attach` is enough there.
"""
