"""`python -m hf_ext.cli` is `hf-ext`."""

import sys

from hf_ext.cli import main

sys.exit(main())
