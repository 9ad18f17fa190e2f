"""A worker of a published method in several processes; started by studies.

python -m dqrm.study.launch N MODULE [ARGUMENT]...
"""

import sys
from pathlib import Path

from dqrm.launch import start_workers

if __name__ == "__main__":
    count, module, *arguments = sys.argv[1:]
    printed = Path(arguments[0]).parent / "printed"
    sys.exit(start_workers(int(count), arguments, module=module, printed=printed))
