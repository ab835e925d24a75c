"""train.py in a process of its own, of a small corpus: `python -m tests.small KEY=VALUE ...`"""

import sys

import train
from data import pack

pack.GROUP_TOKENS = 256  # as the fixture small_groups has it

if __name__ == "__main__":
    sys.exit(train.main(sys.argv[1:]))
