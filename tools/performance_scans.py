"""Further sections on the newest families: bounds, NATTEN, and scans."""

from __future__ import annotations

from typing import Any

from performance_models import FUSED, LABELS, NATTEN, NATTEN_AIM, OURS, judged, table

__all__ = ["of_bounds", "of_natten", "of_scans", "of_selective"]

SCAN, SCAN_AIM = "reference", 20.0
FORM, FORM_AIM = "fla", 1.5
NETWORK_AIM = 3.0
BOUND_AIM = 0.7


def of_bounds(report: dict[str, Any]) -> str:
    """The speedup over plain that a fused model would have with all products at full rate."""
    rows = []
    for row in report["results"]:
        plain, fused = (row["contenders"].get(name, {}) for name in (OURS, FUSED))
        if "gflops" not in plain or "gflops" not in fused or row["threads"] > 1:
            continue
        peak = row["matmul_gflops"][row["dtype"]]
        rows.append(
            [
                *(f"`{row['model']}`", str(row["batch"])),
                *(f"{plain['gflops']:.0f}", f"{fused['gflops']:.0f}", f"{peak:.0f}"),
                *(f"{peak / plain['gflops']:.2f}×", f"{fused['speedup_over'][OURS]:.2f}×"),
            ]
        )
    head = ["GFLOP/s", "batch", "plain", "fused", "1024³ product", "at most", "reached"]
    return (
        "\n\n".join(
            [
                "## What is left to gain",
                "The rate of a network's multiply-adds, and that of a 1024³ matrix product. If all "
                "multiply-adds ran at the product's rate and everything else were free, the fused "
                "model would be `at most` this many times faster than the plain one. A target "
                "above that requires products faster than torch's largest.",
                table(head, rows),
            ]
        )
        + "\n"
    )


def of_natten(reports: dict[str, dict[str, Any]]) -> str:
    """Comparison with the kernels NAT was published with.

    Args:
        reports: measured with an older torch; by the compiler's options for NATTEN.
    """
    rows = []
    for options, report in reports.items():
        for row in report["results"]:
            contenders = row["contenders"]
            times = [f"{contenders[name]['milliseconds']:.1f}" for name in (FUSED, OURS, NATTEN)]
            ratio = contenders[FUSED]["speedup_over"][NATTEN]
            cells = [f"`{row['model']}`", str(row["batch"]), options]
            rows.append([*cells, *times, judged(ratio, NATTEN_AIM)])
    label = LABELS[NATTEN].removeprefix("original ")
    head = ["ms", "batch", "options", FUSED, "plain", label, "fused, times faster (aim)"]
    (torch,) = {report["machine"]["torch"] for report in reports.values()}
    return (
        "\n\n".join(
            [
                "## Compared with NATTEN 0.17.3",
                "Our network with that release's layers, compiled from its source "
                f"(`tools/natten_0_17.py`), torch {torch}, one thread, float32. `pip` compiles it "
                "without options, and so without optimisation.",
                table(head, rows),
            ]
        )
        + "\n"
    )


def of_scans(report: dict[str, Any]) -> str:
    """Gated linear attention by length, and ViG compared with attention, from benchmark_scan.py."""
    names = list(dict.fromkeys(name for row in report["scans"].values() for name in row))
    others = names[1:]
    aims = {SCAN: SCAN_AIM, FORM: FORM_AIM}
    rows = []
    for tokens, found in report["scans"].items():
        own = found[names[0]]["milliseconds"]
        cells = [tokens, f"{own:.3f}", f"{1e6 * own / int(tokens):.0f}"]
        cells += [
            judged(found[name]["times_longer"], aims.get(name)) if name in found else "–"
            for name in others
        ]
        rows.append(cells)
    head = ["tokens", "kernel, ms", "ns per token"]
    labels = {SCAN: "scan in Python", "chunked": "chunks in torch", FORM: "`fla`'s form"}
    head += [f"{labels.get(name, name)}, times slower" for name in others]
    side, networks = report["networks"]["side"], report["networks"]
    ours, theirs = (networks[name]["milliseconds"] / 1e3 for name in ("vig_t", "deit_tiny"))
    longer = judged(networks["deit_tiny"]["times_longer"], NETWORK_AIM)
    return (
        "\n\n".join(
            [
                "## Gated linear attention",
                "One direction with the states of ViG-T, 3 heads of 32×64, one thread, float32, "
                "by `python tools/benchmark_scan.py`.",
                table(head, rows),
                f"An image of {side}×{side} takes {ours:.1f} s with fused `vig_t` and "
                f"{theirs:.1f} s with timm's `deit_tiny_patch16_224`: a speedup of {longer}.",
            ]
        )
        + "\n"
    )


def of_selective(report: dict[str, Any]) -> str:
    """The selective scan by states and length, from benchmark_scan.py."""
    others = {
        "reference": ("scan in Python", SCAN_AIM),
        "chunked": ("chunks in torch", None),
        "transformers": ("`transformers`' scan", FORM_AIM),
        "mambapy": ("`mambapy`'s", FORM_AIM),
    }
    rows = []
    for row in report["scans"]:
        found, tokens = row["contenders"], row["tokens"]
        own, of_map = (found[name]["milliseconds"] for name in ("cpu", "map"))
        bound = max(row["bounds"], key=row["bounds"].__getitem__)
        share = row["bounds"][bound] / own
        rows.append(
            [
                *(str(row["states"]), str(tokens), f"{own:.3f}", f"{1e6 * own / tokens:.0f}"),
                f"{100 * share:.0f} % of {bound}",
                *(
                    judged(found[name]["times_longer"], aim) if name in found else "–"
                    for name, (_, aim) in others.items()
                ),
                *(f"{of_map:.3f}", f"{1e6 * of_map / tokens:.0f}"),
            ]
        )
    head = ["states", "tokens", "kernel, ms", "ns per token", f"reached (aim {BOUND_AIM:.0%})"]
    head += [f"{label}, times slower" for label, _ in others.values()]
    head += ["map in four orders, ms", "ns per pixel"]
    rates = report["nanoseconds"]
    return (
        "\n\n".join(
            [
                "## Selective scan",
                "Four groups with the channels of VMamba-T's first stage, 96 each with one state "
                "and 192 with 16, one thread, float32, by "
                "`python tools/benchmark_scan.py --selective`. At most, the memory reads and "
                f"writes {1 / rates['byte']:.1f} GB/s, and numpy takes "
                f"{rates['exponential']:.2f} ns for an exponential in float32 and "
                f"{rates['logarithm']:.2f} for a logarithm; `reached` is the time that the scan "
                "needs by the scarcer of both, over what it takes. `map` makes its steps, too, and "
                "sums the orders.",
                table(head, rows),
            ]
        )
        + "\n"
    )
