"""Write the tables of README.md and bench/README.md from the files in bench/results/.

    python bench/readme.py [--check] [--unclean NAME ...]

Each block `<!-- name:begin --> … <!-- name:end -->` is generated from bench/results/<name>.json by
the function of that name in harness/tables.py. --check only reports whether the files are up to
date. A result whose commit ends in + was measured with uncommitted changes and is rejected, except
for those in EXCEPTIONS, whose tables say so, and those given by --unclean.
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

READMES = (Path(__file__).parents[1] / "README.md", Path(__file__).parent / "README.md")
EXCEPTIONS = {"loss_head_cpu"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--unclean", nargs="*", default=(), metavar="NAME")
    options = parser.parse_args()
    changed = False
    for readme in READMES:
        before = readme.read_text(encoding="utf-8")
        text = filled(before, RESULTS, {*EXCEPTIONS, *options.unclean})
        changed |= text != before
        if not options.check:
            readme.write_text(text, encoding="utf-8")
    return int(options.check and changed)


def filled(text: str, results: Path, unclean: Collection[str]) -> str:
    """Return the text with a new table in every block that has a result file.

    Raises:
        SystemExit: a result was measured with uncommitted changes and is not in `unclean`.
    """
    for name, table in TABLES.items():
        path = results / f"{name}.json"
        if not path.exists():
            continue
        record = json.loads(path.read_text(encoding="utf-8"))
        if commit_of(record).endswith("+") and name not in unclean:
            raise SystemExit(
                f"{path.name}: measured at {commit_of(record)} with uncommitted changes; "
                f"commit them and measure again, or pass --unclean {name}"
            )
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        block = f"{begin}\n{table(record)}\n{end}"
        text = pattern.sub(lambda _, block=block: block, text)
    return text


if __name__ == "__main__":
    sys.exit(main())
