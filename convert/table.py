"""The plan and the verification as tables for people."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from bitroute.convert.entry import Entry
from bitroute.convert.fold import Fold, fold_by
from bitroute.convert.plan import ComponentPlan, Plan
from bitroute.convert.snippet import loading_code, loading_dtype
from bitroute.convert.verify import Verification

REST = "norms, embeddings, biases"
COLUMNS = {  # column → the terminal width from which it is shown
    "layers": 0, "role": 140, "rule": 100, "backend": 0, "shape": 120, "bits": 0, "before": 140, "after": 0,
}  # fmt: skip
NUMBERS = {"bits", "before", "after"}


def plan_table(plan: Plan, width: int = 160) -> RenderableType:
    """Every component and its layers, folded; then totals and what loading will need.

    width: of the terminal, in columns; narrow ones lose the columns that can be looked up elsewhere.
    """
    columns = [column for column, from_width in COLUMNS.items() if width >= from_width]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in NUMBERS else "left", no_wrap=column in NUMBERS)
    for component in plan.components:
        rows = [dict(zip(COLUMNS, row, strict=True)) for row in component_rows(component)]
        taken = sum(max(len(row[column]) for row in rows) + 1 for column in columns[1:])
        table.add_row(f"[bold]{escape(component.name)}[/bold] ({component.container.name} folder)")
        for row in rows:
            row["layers"] = broken_at_dots(row["layers"], max(width - taken - 8, 24))
            table.add_row(*(escape(row[column]) for column in columns))
        table.add_section()
    return Group(table, Text(), Text(plan_summary(plan)))


def broken_at_dots(name: str, width: int) -> str:
    """A layer name over several lines, broken behind dots and commas."""
    lines = [""]
    for part in re.findall(r"[^.,]*[.,]?", name):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("  ")
        lines[-1] += part
    return "\n".join(lines)


def component_rows(component: ComponentPlan) -> Iterable[Sequence[str]]:
    rest = [entry for entry in component.entries if not _shown(entry)]
    by_layer = {entry.layer: entry for entry in component.entries if _shown(entry)}
    for key, names, folds in _joined(fold_by({layer: _key(entry) for layer, entry in by_layer.items()})):
        entries = [by_layer[layer] for fold in folds for layer in fold.names]
        yield (names, *key, *_sizes(entries))
    if rest:
        yield (f"{REST} ({len(rest)} tensors)", "", "", "keep", "", *_sizes(rest))
    yield (f"total of {component.name}: {component.parameters / 1e6:,.1f} M parameters", "", "", "", "",
           f"{component.bits_per_weight:.2f}", size(component.source_bytes), size(component.size_bytes))  # fmt: skip


def plan_summary(plan: Plan) -> str:
    copied = f"copied untouched: {len(plan.copied)} files, {size(sum(plan.copied.values()))}"
    ratio = plan.size_bytes / max(plan.source_bytes, 1)
    lines = [
        copied,
        f"whole pipeline: {size(plan.source_bytes)} → {size(plan.size_bytes)} ({ratio:.0%})",
        f"loading needs: pip install {' '.join(plan.packages)}",
        *(plan.devices or ["computes on any device that computes in bf16: weights are decoded layer by layer"]),
        f"device memory for all weights at once: {size(sum(c.size_bytes for c in plan.components))}"
        " + what is copied + activations",
        f"disk: {size(plan.size_bytes)} · memory, above the imported libraries: job up to "
        f"{size(plan.job_peak_bytes)}, verify up to {size(plan.verify_peak_bytes)}",
    ]
    notes = [f"note: {component.name}: {note}" for component in plan.components for note in component.notes]
    return "\n".join([*lines, *notes])


def verification_text(found: Verification) -> str:
    lines = [f"{name}: {words}" for name, words in found.components.items()]
    lines += [f"note: {note}" for note in found.notes]
    if found.layers:
        lines.append(f"worst layers of {len(found.layers)} by SQNR (decoded weight against the source):")
        lines += [f"  {w.sqnr_db:7.1f} dB  {w.backend:<14} {w.component}.{w.layer}" for w in found.worst[:5]]
    lines += [str(problem) for problem in found.problems]
    return "\n".join([*lines, f"{found.verdict}: {found.folder}"])


def verification_json(found: Verification) -> dict[str, Any]:
    return {
        "folder": str(found.folder),
        "verified": found.verified,
        "compared": found.compared,
        "problems": [vars(problem) for problem in found.problems],
        "notes": found.notes,
        "components": found.components,
        "layers": [{**vars(layer), "sqnr_db": _finite(layer.sqnr_db)} for layer in found.layers],
    }


def _finite(number: float) -> float | None:
    """JSON has no infinity: null stands for a layer that lost nothing."""
    return number if math.isfinite(number) else None


def result_text(plan: Plan, out: Path) -> str:
    """What was written, and the lines that load it."""
    needs_import = any(component.container.name == "bitroute" for component in plan.components)
    bare = plan.components[0].component if plan.pipeline.bare else None
    dtype = loading_dtype(plan.pipeline.dequantize, (component.container.name for component in plan.components))
    snippet = loading_code(str(out), needs_import, bare=bare, variant=plan.variant, dtype=dtype).splitlines()
    wrote = f"wrote {out}: {size(plan.source_bytes)} → {size(plan.size_bytes)}"
    needs = f"pip install {' '.join(plan.packages)}"
    return "\n".join([wrote, f"to load it: {needs}", *plan.devices, *(f"    {line}" for line in snippet)])


def size(size_bytes: float) -> str:
    """Decimal units, as disks and the Hub count."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size_bytes) < 1000:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.2f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.2f} TB"


def _shown(entry: Entry) -> bool:
    return entry.kind == "Linear" or "Conv" in entry.kind


def _key(entry: Entry) -> tuple[str, str, str, str]:
    line = entry.where.rpartition(":")[2]
    reason = f"{entry.reason}, line {line}" if line.isdigit() else entry.reason
    return (entry.role, reason, str(entry.backend), "×".join(str(n) for n in entry.weight.shape))


def _joined(folds: Iterable[tuple[Any, Fold]]) -> Iterable[tuple[Any, str, list[Fold]]]:
    """Folds that differ only in the last part of the name become one row."""
    rows: dict[tuple[Any, str, tuple[int, ...], str], list[Fold]] = {}
    for key, fold in folds:
        parent = fold.after.rpartition(".")[0] if fold.numbers else fold.before
        rows.setdefault((key, fold.before, fold.numbers, parent), []).append(fold)
    for (key, _, _, parent), alike in rows.items():
        first = alike[0]
        if len(alike) == 1:
            yield key, str(first), alike
        else:
            last = ",".join(fold.after.rpartition(".")[2] for fold in alike)
            shared = str(first).removesuffix(first.after)
            yield key, f"{shared}{parent}.{{{last}}}", alike


def _sizes(entries: Sequence[Entry]) -> tuple[str, str, str]:
    before = sum(entry.source.spec.size_bytes for entry in entries)
    after = sum(entry.size_bytes for entry in entries)
    elements = sum(entry.weight.numel for entry in entries)
    return f"{8 * after / max(elements, 1):.2f}", size(before), size(after)
