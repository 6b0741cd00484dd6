#!/usr/bin/env bash
# Expected: of a file that fsspec opens with autocommit=False nothing is at its place before commit(), and all of it
# after: that is what transactions are for, and on a local file system a rename does it.
# Seen, fsspec 2026.9.0: LocalFileSystem makes its temporary file in the folder of temporary files (TMPDIR), wherever the
# file is to lie, and commit() is shutil.move, which between two file systems is a copy into the very place. While it
# copies, whoever looks there sees a file that grows, and a process that is killed leaves half of it:
#
#     on one file system:   a reader saw 1 size of 400,000,000 bytes
#     on two file systems:  a reader saw 38 sizes of 400,000,000 bytes
#
# (how many depends on the machine: 10 to 40)
#
# So: on a disk that is not /tmp's, as a mounted volume or a shared folder, fsspec's own transaction is no way to publish a
# file. Write beside the place, and rename there.
set -euo pipefail
folder=$(mktemp -d)
memory=$(mktemp -d -p /dev/shm)
trap 'rm -rf "$folder" "$memory"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet fsspec==2026.9.0
cd "$folder"
"$folder/venv/bin/python" - "$folder" "$memory" <<'PYTHON'
import os
import sys
import tempfile
import threading

from fsspec.implementations.local import LocalFileSystem

here, elsewhere = sys.argv[1:]
if os.stat(here).st_dev == os.stat(elsewhere).st_dev:
    sys.exit("cannot be shown here: the folder of temporary files and /dev/shm are one file system")
N = 400_000_000


def sizes_seen(temporary):
    tempfile.tempdir = temporary
    place = os.path.join(here, "file")
    file = LocalFileSystem().open(place, "wb", autocommit=False)
    for _ in range(N // 1_000_000):
        file.write(bytes(1_000_000))
    file.close()
    assert not os.path.exists(place)
    seen, ended = set(), threading.Event()

    def look():
        while not ended.is_set():
            if os.path.exists(place):
                seen.add(os.stat(place).st_size)

    reader = threading.Thread(target=look)
    reader.start()
    file.commit()
    ended.set()
    reader.join()
    seen.add(os.stat(place).st_size)
    os.unlink(place)
    return seen


one, two = sizes_seen(here), sizes_seen(elsewhere)
print(f"on one file system:   a reader saw {len(one)} size of {N:,} bytes")
print(f"on two file systems:  a reader saw {len(two)} sizes of {N:,} bytes")
if one != {N} or len(two) < 3:
    sys.exit("no longer so: commit() shows the whole file at once")
PYTHON
