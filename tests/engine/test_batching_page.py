"""docs/batching.md has the tables that ``POLICIES`` and ``ORDERS`` give: ``python -m tests.engine.test_batching_page``
writes them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from pagedattn.engine.orders import ORDERS
from pagedattn.engine.policy import POLICIES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "batching.md"


def axes_table(rows: Mapping[str, Any]) -> str:
    """One line for each field in which two rows differ, one column for each row; a field's default is left out."""
    titles = " | ".join(f"`{title}`" for title in rows)
    lines = [f"| | {titles} |", "|---" * (len(rows) + 1) + "|"]
    for field in fields(next(iter(rows.values()))):
        values = [getattr(row, field.name) for row in rows.values()]
        if len({repr(value) for value in values}) > 1:
            cells = ("" if value == field.default else str(value).replace("_", " ") for value in values)
            lines.append(f"| {field.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def with_tables(page: str) -> str:
    for name, rows in (("policies", POLICIES), ("orders", ORDERS)):
        opening, closing = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, _, rest = page.partition(opening)
        _, found, after = rest.partition(closing)
        assert found, f"no place for the table of {name}"
        page = f"{before}{opening}{axes_table(rows)}\n{closing}{after}"
    return page


def test_the_page_has_the_tables_of_the_code() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_tables(page), "python -m tests.engine.test_batching_page writes them"


def test_the_page_explains_every_row() -> None:
    page = PAGE.read_text(encoding="utf-8")
    paragraphs = " ".join(re.findall(r"^\*\*(.*?)\.\*\*", page, flags=re.MULTILINE)).replace(",", "").split()
    assert paragraphs == [*POLICIES, *ORDERS]


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
