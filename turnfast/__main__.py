"""`python -m turnfast`: the form that torchrun starts on every rank."""

import sys

from .cli import main

sys.exit(main())
