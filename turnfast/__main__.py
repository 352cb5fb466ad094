"""`python -m turnfast`, which is what torchrun starts on every rank."""

import sys

from .cli import main

sys.exit(main())
