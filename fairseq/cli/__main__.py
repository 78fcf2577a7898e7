"""``python -m fairseq.cli``: the same as ``fairseq-vit``."""

import sys

from fairseq.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
