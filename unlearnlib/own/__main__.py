"""What ``python -m unlearnlib.own`` does."""

import sys

from unlearnlib.own.command_line import main

if __name__ == "__main__":
    sys.exit(main())
