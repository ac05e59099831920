"""Download public collections of hostile files, for ``test_corpora.py``. They are not part of this repository.

    python tests/fuzz/corpora.py FOLDER

Each comes as one archive from GitHub, at a fixed commit.
"""

from __future__ import annotations

import argparse
import io
import tarfile
import urllib.request
from pathlib import Path, PurePosixPath

ADDRESS = "https://codeload.github.com/{repository}/tar.gz/{commit}"
MAX_ARCHIVE = 50 << 20
MAX_FILE = 4 << 20

# Repository -> commit, and the folders that are taken.
REPOSITORIES = {
    "mmaitre314/picklescan": ("f15d54da3dec9aa28a87ede82f87882bb80f1023", ("tests/data", "tests/data2")),
    "HDFGroup/cve_hdf5": ("4e63a93f8d88f05fe41abd3ef8ad6cbf16bc3646", ("cvefiles", "fuzzerfiles")),
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path)
    folder = options.parse_args().folder
    for repository, (commit, wanted) in REPOSITORIES.items():
        with urllib.request.urlopen(ADDRESS.format(repository=repository, commit=commit), timeout=60) as answer:
            archive = answer.read(MAX_ARCHIVE)
        count = extract(archive, folder / repository.partition("/")[2], wanted)
        print(f"{repository}: {count} files")


def extract(archive: bytes, folder: Path, wanted: tuple[str, ...]) -> int:
    """Write the regular files below the folders ``wanted`` of an archive of GitHub. Return their number."""
    count = 0
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as members:
        for member in members:
            path = PurePosixPath(*PurePosixPath(member.name).parts[1:])  # without the folder that GitHub adds
            if not member.isreg() or member.size > MAX_FILE or ".." in path.parts or str(path.parent) not in wanted:
                continue
            contents = members.extractfile(member)
            assert contents
            (folder / path.parent).mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(contents.read())
            count += 1
    return count


if __name__ == "__main__":
    main()
