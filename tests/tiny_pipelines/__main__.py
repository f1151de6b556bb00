"""Write the tiny folders.

python -m tests.tiny_pipelines OUT [NAME ...]
"""

import argparse
from pathlib import Path

from tests.tiny_pipelines.folders import ALL, write_folders


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.tiny_pipelines", description="Write the tiny folders.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write them into")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which ones of {', '.join(ALL)} (default: all)")
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in ALL]:
        parser.error(f"there is no folder {', '.join(unknown)}; there are {', '.join(ALL)}")
    write_folders(args.out, args.names or ALL)


if __name__ == "__main__":
    main()
