#!/usr/bin/env python3
"""The notices of what is linked into the binary, for `script/supply-chain`.

Reads `cargo metadata` on standard input. Licences that leave a choice are
taken as MIT where that is among them. Exit status 1 names what has no notice.
"""

import json
import re
import sys
from pathlib import Path

FILES = re.compile(r"(licen[cs]e|copying|unlicense|notice)", re.IGNORECASE)

# For crates whose package has no file with it: the text of the licence that
# they name, with their authors.
TEXTS = {
    "BSD-2-Clause": """\
Copyright (c) {authors}

Redistribution and use in source and binary forms, with or without
modification, are permitted provided that the following conditions are met:

1. Redistributions of source code must retain the above copyright notice, this
   list of conditions and the following disclaimer.

2. Redistributions in binary form must reproduce the above copyright notice,
   this list of conditions and the following disclaimer in the documentation
   and/or other materials provided with the distribution.

THIS SOFTWARE IS PROVIDED BY THE COPYRIGHT HOLDERS AND CONTRIBUTORS "AS IS" AND
ANY EXPRESS OR IMPLIED WARRANTIES, INCLUDING, BUT NOT LIMITED TO, THE IMPLIED
WARRANTIES OF MERCHANTABILITY AND FITNESS FOR A PARTICULAR PURPOSE ARE
DISCLAIMED. IN NO EVENT SHALL THE COPYRIGHT HOLDER OR CONTRIBUTORS BE LIABLE FOR
ANY DIRECT, INDIRECT, INCIDENTAL, SPECIAL, EXEMPLARY, OR CONSEQUENTIAL DAMAGES
(INCLUDING, BUT NOT LIMITED TO, PROCUREMENT OF SUBSTITUTE GOODS OR SERVICES;
LOSS OF USE, DATA, OR PROFITS; OR BUSINESS INTERRUPTION) HOWEVER CAUSED AND ON
ANY THEORY OF LIABILITY, WHETHER IN CONTRACT, STRICT LIABILITY, OR TORT
(INCLUDING NEGLIGENCE OR OTHERWISE) ARISING IN ANY WAY OUT OF THE USE OF THIS
SOFTWARE, EVEN IF ADVISED OF THE POSSIBILITY OF SUCH DAMAGE.
""",
}

HEAD = """\
Third-party notices of ackonce

ackonce itself is licensed under MIT OR Apache-2.0. Its binary has the crates
below linked into it, and the standard library of Rust (MIT OR Apache-2.0,
https://github.com/rust-lang/rust). Where a licence leaves a choice, MIT was
chosen if it is offered.
"""


def linked(metadata):
    """The packages in the binary: normal dependencies, without macros, which
    run in the compiler."""
    packages = {package["id"]: package for package in metadata["packages"]}
    nodes = {node["id"]: node for node in metadata["resolve"]["nodes"]}
    root = metadata["resolve"]["root"]
    seen, waiting = set(), [root]
    while waiting:
        for dep in nodes[waiting.pop()]["deps"]:
            kinds = [kind["kind"] for kind in dep["dep_kinds"]]
            targets = packages[dep["pkg"]]["targets"]
            is_macro = any("proc-macro" in target["kind"] for target in targets)
            if None in kinds and not is_macro and dep["pkg"] not in seen:
                seen.add(dep["pkg"])
                waiting.append(dep["pkg"])
    found = (packages[name] for name in seen)
    return sorted(found, key=lambda package: (package["name"], package["version"]))


def texts(package):
    """Its licence files, or the text of the licence it names."""
    licence = package["license"] or ""
    folder = Path(package["manifest_path"]).parent
    found = [path for path in folder.iterdir() if FILES.match(path.name)]
    inner = [path for place in found if place.is_dir() for path in place.iterdir()]
    files = sorted(path for path in found + inner if path.is_file())
    mit = [path for path in files if "MIT" in path.name.upper()]
    if mit and "MIT" in licence and " AND " not in licence:
        files = mit + [path for path in files if path.name.upper().startswith("NOTICE")]
    if files:
        return [path.read_text(encoding="utf-8", errors="replace") for path in files]
    if licence in TEXTS and package["authors"]:
        names = [re.sub(r"\s*<.*>", "", author) for author in package["authors"]]
        return [TEXTS[licence].format(authors=", ".join(names))]
    return []


def main():
    """Prints the notices, each text once with the crates it belongs to."""
    by_text, missing = {}, []
    for package in linked(json.load(sys.stdin)):
        name = f"{package['name']} {package['version']} ({package['license']})"
        found = texts(package)
        if not found:
            missing.append(name)
        for text in found:
            key = " ".join(text.split())
            by_text.setdefault(key, (text, []))[1].append(name)
    if missing:
        print("no notice is known of: " + ", ".join(missing), file=sys.stderr)
        print("add the text of its licence to script/lib/notices.py", file=sys.stderr)
        return 1
    print(HEAD)
    for text, names in by_text.values():
        print("-" * 78)
        print("\n".join(names))
        print()
        print(text.strip("\n"))
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
