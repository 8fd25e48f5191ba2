"""UPerNet over normalised maps of a backbone whose own batch norms stay as they are.

As in the configs published with BiFormer, https://arxiv.org/abs/2303.08810.
"""

_base_ = ["./upernet.py"]

model = dict(backbone=dict(out_norms=True, norm_eval=True))
