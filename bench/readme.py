"""Put the figures of bench/results/ into README.md, between its markers.

    python bench/readme.py [--check] [--unclean NAME ...]

Each block `<!-- name:begin --> … <!-- name:end -->` is made from bench/results/<name>.json by the
function of that name in tables.py; --check only says whether the README is up to date. A result
whose commit ends in + was measured with changes that nobody else can have: it is refused, but for
those in EXCEPTIONS, which say so under their table, and those that --unclean names.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Collection
from pathlib import Path

from harness.provenance import RESULTS
from harness.tables import TABLES, commit_of

README = Path(__file__).parent.parent / "README.md"
EXCEPTIONS = {"loss_head_cpu"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--unclean", nargs="*", default=(), metavar="NAME")
    options = parser.parse_args()
    before = README.read_text(encoding="utf-8")
    text = filled(before, RESULTS, {*EXCEPTIONS, *options.unclean})
    if options.check:
        return int(text != before)
    README.write_text(text, encoding="utf-8")
    return 0


def filled(text: str, results: Path, unclean: Collection[str]) -> str:
    """The text with a fresh table in every block that has a result file.

    Raises:
        SystemExit: a result comes from no commit, and is not one of `unclean`.
    """
    for name, table in TABLES.items():
        path = results / f"{name}.json"
        if not path.exists():
            continue
        record = json.loads(path.read_text(encoding="utf-8"))
        if commit_of(record).endswith("+") and name not in unclean:
            raise SystemExit(
                f"{path.name}: measured at {commit_of(record)}, with changes that are in no "
                f"commit; commit them and measure again, or give --unclean {name}"
            )
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        block = f"{begin}\n{table(record)}\n{end}"
        text = pattern.sub(lambda _, block=block: block, text)
    return text


if __name__ == "__main__":
    sys.exit(main())
