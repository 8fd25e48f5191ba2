"""What is known of the families: their rows in README, NOTICE, and the page on parity.

Rows take names from the titles of the families' pages, citations from the modules' docstrings, and
everything else from the figures of the originals (``tests/reference``) and ``docs/parity.json``.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

from tables_models import Report, Row, table

import backbones
from backbones.cli import parity as originals
from backbones.cli.contenders import is_timms
from backbones.cli.reports import read_report
from backbones.core.registry import published_weights

DOCS = Path(__file__).resolve().parent.parent / "docs"
DIRECT = (".pth", ".tar", ".pt")
_CITATION = re.compile(r'([^.:]+(?: et al\.)?), "([^"]+)",\s+https://arxiv\.org/abs/(\d+\.\d+)')
_HEAD = "Model"  # the first word of NOTICE's table, which ends at an empty line
# What the authors say of families' licences beyond a name: code, weights.
_LICENCES = {
    "ecanet": ("MIT", "none stated"),
    "favit": ("none stated", "none published"),
    "proxylessnas": ("MIT", "none stated"),
    "ravlt": ("none stated", "MIT"),
    "van": ("Apache-2.0 ¹", "Apache-2.0 ¹"),
}
_COUNTS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    *("nineteen", "twenty"),
)

# -- what a page says of an original ---------------------------------------------------------------


def claim(reported: Row) -> tuple[float | None, str, float | None]:
    """ImageNet top-1 (fine-tuned if there is no other), a remark, and the G MACs stated with it.

    Without a top-1, the remark is the accuracy on the first medical set, if any.
    """
    ways = {"": reported, **{k: v for k, v in reported.items() if isinstance(v, dict)}}
    for how, figures in ways.items():
        if figures.get("top1") is not None:
            return figures["top1"], how.replace("_", " "), figures.get("flops_g")
    for dataset, accuracy in reported.get("medmnist_acc", {}).items():
        return None, f"{accuracy} ({dataset})", None
    return None, "", None


def links(figures: Row) -> list[str]:
    """Where the authors published weights, files first."""
    found = [each["url"] for each in figures["weights"] if each.get("url")]
    return sorted(found, key=lambda url: not url.endswith(DIRECT))


def licence(figures: Row) -> str:
    """The name of a licence without remarks, which the family's page has."""
    return str(figures["licence"]).partition(" (")[0]


def _title(docs: Path, family: str) -> str:
    """The heading of a family's page."""
    page = (docs / "families" / f"{family}.md").read_text(encoding="utf-8")
    return page.partition("\n")[0].removeprefix("# ")


def _variants(family: str) -> list[str]:
    return [name for found, name in originals.variants() if found == family]


def _downloads(name: str) -> bool:
    return bool(next(iter(published_weights(name).values())).has_weights)


# -- parity ----------------------------------------------------------------------------------------


def parity(report: Report) -> str:
    """A table for each family: figures of the originals, and the errors of ours."""
    parts, errors = [], report["results"]
    for family in dict.fromkeys(family for family, _ in originals.variants()):
        names = [name for name in _variants(family) if name in errors]
        head = ("Variant", "M params", "G MACs", "Error, output", "Error, stages", "Reported")
        lines = [f"| {' | '.join((*head, 'Weights', 'Licence'))} |"]
        lines.append("|---|" + "---:|" * 5 + "---|---|")
        lines += [_parity_row(family, name, errors[name]) for name in names]
        parts += [f"## {family}", "\n".join(lines)] if names else []
    return "\n\n".join(parts)


def _parity_row(family: str, variant: str, errors: Row) -> str:
    figures = originals.reference(family, variant)
    top1, remark, _ = claim(figures["reported"])
    reported = f"{top1} ({remark})" if top1 and remark else f"{top1 or remark or '–'}"
    published = links(figures)
    cells = [
        f"`{variant}`",
        *(f"{figures['params'] / 1e6:.2f}", f"{figures['macs'] / 1e9:.2f}"),
        *(f"{errors[key]:.1e}" for key in ("output", "stages")),
        reported,
        f"[{len(published)}]({published[0]})" if published else "none published",
        re.sub(r" \([^)]*\)", "", figures["licence"]),
    ]
    return "| " + " | ".join(cells) + " |"


def parity_cpus(report: Report) -> str:
    """The CPUs that made the errors."""
    return "; ".join(sorted({errors["cpu"] for errors in report["results"].values()}))


def worst_parity(docs: Path) -> str:
    """The greatest errors of an output and of a stage's map, and whose they are."""
    errors = read_report(docs / "parity.json")["results"]
    worst = {key: max(errors, key=lambda name: errors[name][key]) for key in ("output", "stages")}
    shown = [f"{errors[name][key]:.1e} (`{name}`)" for key, name in worst.items()]
    return f"{shown[0]} for outputs and {shown[1]} for maps of stages"


# -- README ----------------------------------------------------------------------------------------


def families(docs: Path) -> str:
    """How many families there are, in a word."""
    count = len(backbones.list_families())
    return _COUNTS[count] if count < len(_COUNTS) else str(count)


def readme_models(docs: Path) -> str:
    """A line for each family: figures as published, timm, downloads, licences, parity."""
    errors = read_report(docs / "parity.json")["results"]
    rows = []
    for family in backbones.list_families():
        names = _variants(family)
        figures = [originals.reference(family, name) for name in names]
        top1 = [top for each in figures if (top := claim(each["reported"])[0]) is not None]
        owned = sum(map(is_timms, names))
        code = licence(figures[0])
        published = any(each["weights"] for each in figures)
        code, weights = _LICENCES.get(family, (code, code if published else "none published"))
        worst = max(errors[name]["output"] for name in names)
        rows.append(
            [
                f"[{_title(docs, family)}](docs/families/{family}.md)",
                f"{len(names)}, `{names[0]}` …",
                _span(top1) if top1 else "–",
                _span([each["params"] / 1e6 for each in figures]),
                f"{owned} of {len(names)}" if owned else "no",
                f"{sum(map(_downloads, names))} of {len(names)}",
                *(code, weights, f"{worst:.0e}".replace("e-0", "e-")),
            ]
        )
    head = ["Family", "Variants", "Top-1, %", "M params", "In timm", "Downloads", "Code", "Weights"]
    return table([*head, "Parity ²"], rows, 9)


def _span(values: Sequence[float]) -> str:
    low, high = (f"{value:.1f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} – {high}"


def counts(docs: Path) -> str:
    """How many variants there are, and which have no weights to download."""
    parts, missing = [], 0
    for family in dict.fromkeys(family for family, _ in originals.variants()):
        names = _variants(family)
        without = [name for name in names if not _downloads(name)]
        if without:
            all_of_it = f"all of {_title(docs, family)}"
            some = ", ".join(f"`{name}`" for name in without)
            parts.append(all_of_it if without == names else some)
        missing += len(without)
    return f"{missing} of {len(originals.variants())} variants have none: {', '.join(parts)}"


# -- NOTICE ----------------------------------------------------------------------------------------


def notice(text: str) -> str:
    """The text of NOTICE with the rows of all families."""
    head, rest = re.split(rf"^(?={_HEAD})", text, maxsplit=1, flags=re.MULTILINE)
    heading, _, rest = rest.partition("\n")
    rows = [heading]
    for family in backbones.list_families():
        original = originals.reference(family, _variants(family)[0])
        source = f"{original['source'].partition('@')[0]}; licence: {original['licence']}"
        for authors, title, paper in _citations(family):
            row = (
                f"{_title(DOCS, family)}: {_last_names(authors)}, {title}, arXiv:{paper}. {source}"
            )
            rows.append(textwrap.fill(row, 100, subsequent_indent="  ", break_on_hyphens=False))
    return head + "\n".join(rows) + "\n\n" + rest.partition("\n\n")[2]


def _citations(family: str) -> list[tuple[str, str, str]]:
    """Authors, title and arXiv number of each paper that the module's docstring cites."""
    text = " ".join((getattr(backbones, family).__doc__ or "").split())
    found = [(a.strip(), t, p) for a, t, p in _CITATION.findall(text)]
    if not found:
        raise ValueError(f'{family}: cite the paper as Authors, "Title", https://arxiv.org/abs/…')
    return found


def _last_names(authors: str) -> str:
    if authors.endswith(" et al."):
        return f"{authors.removesuffix(' et al.').split()[-1]} et al."
    return ", ".join(name.split()[-1] for name in re.split(r", | and ", authors))


TABLES: dict[str, Callable[..., str]] = {"parity": parity, "parity_cpus": parity_cpus}
CLAIMS: dict[str, Callable[..., str]] = {
    function.__name__: function for function in (families, readme_models, counts, worst_parity)
}
