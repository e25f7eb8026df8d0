#!/usr/bin/env python3
"""Every crate in the program, with its licence and what its authors say of it.

Written for the package: the licences of most crates ask that their text goes
along with a binary. Texts that are the same word for word stand there once.
"""

import json
import pathlib
import subprocess
import sys

NAMES = ("license", "licence", "copying", "notice", "copyright", "unlicense")


def packages():
    """The crates that are linked into the program, by name and version."""
    command = ["cargo", "metadata", "--format-version", "1", "--locked"]
    rustc = subprocess.run(["rustc", "-vV"], check=True, capture_output=True, text=True)
    host = next(line[6:] for line in rustc.stdout.splitlines() if line.startswith("host: "))
    answer = subprocess.run(
        [*command, "--filter-platform", host], check=True, capture_output=True
    )
    metadata = json.loads(answer.stdout)
    known = {package["id"]: package for package in metadata["packages"]}
    nodes = {node["id"]: node for node in metadata["resolve"]["nodes"]}
    root = metadata["resolve"]["root"]
    found, waiting = set(), [root]
    while waiting:
        node = nodes[waiting.pop()]
        for dependency in node["deps"]:
            # No kind is what a program is linked with; others build or test it.
            linked = any(kind["kind"] is None for kind in dependency["dep_kinds"])
            if linked and dependency["pkg"] not in found:
                found.add(dependency["pkg"])
                waiting.append(dependency["pkg"])
    return sorted((known[i] for i in found), key=lambda p: (p["name"], p["version"]))


def texts(package):
    """The files in which a crate says under what terms it may be used."""
    folder = pathlib.Path(package["manifest_path"]).parent
    files = sorted(f for f in folder.iterdir() if f.is_file())
    for file in files:
        if file.name.lower().startswith(NAMES):
            yield file.name, file.read_text(encoding="utf-8", errors="replace").strip()


def main():
    crates = packages()
    print("ackonce contains these crates, each under the licence that is named.\n")
    seen = {}
    for package in crates:
        name = f"{package['name']} {package['version']}"
        licence = package["license"] or f"see {package['license_file']}"
        print(f"{name}: {licence} {package['repository'] or ''}".rstrip())
        for file, text in texts(package):
            seen.setdefault(text, []).append(f"{name} ({file})")
    for text, owners in seen.items():
        print(f"\n{'=' * 78}\n{', '.join(owners)}\n{'-' * 78}\n{text}")
    print(f"{len(crates)} crates, {len(seen)} texts", file=sys.stderr)


if __name__ == "__main__":
    main()
