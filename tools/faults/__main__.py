"""`nox -s faults -- NAME [options]`: runs one file of this folder; without a name those of `_table.py`."""

import sys

from ..tables import main
from ._table import TABLE

main(TABLE, sys.argv[1:])
