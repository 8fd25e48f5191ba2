"""Averaged weights, evaluated and saved in place of the last ones.

With the momentum of the configs published with UniRepLKNet, https://arxiv.org/abs/2311.15599.
"""

custom_hooks = [
    dict(
        type="EMAHook",
        ema_type="ExpMomentumEMA",
        momentum=1e-4,
        update_buffers=True,
        priority=49,
    )
]
