"""Audit of the pinned dependencies: exit status 1 if a known advisory concerns one of them.

    python .ci/audit.py constraints.txt

pip-audit asks the database of the package index. Where that cannot be reached, nothing is known, which is said.
"""

import json
import subprocess
import sys

command = [sys.executable, "-m", "pip_audit", "--no-deps", "--disable-pip", "--progress-spinner=off", "--format=json"]
run = subprocess.run([*command, "-r", *sys.argv[1:]], capture_output=True, text=True)
try:
    packages = json.loads(run.stdout)["dependencies"]
except (ValueError, KeyError):
    answer = run.stderr.strip() or run.stdout.strip() or "no answer"
    print(f"Nothing was audited: {answer.splitlines()[-1]}")
    sys.exit(0)
unknown = [package["name"] for package in packages if "skip_reason" in package]
found = [(package, advisory) for package in packages for advisory in package.get("vulns", [])]
for package, advisory in found:
    fixed = ", ".join(advisory["fix_versions"]) or "no version yet"
    print(f"{package['name']} {package['version']}: {advisory['id']}, mended in {fixed}")
print(
    f"{len(packages) - len(unknown)} of {len(packages)} pinned packages were audited, {len(found)} advisories found."
)
if len(unknown) == len(packages):
    print("The package index has no database of advisories.")
elif unknown:
    print(f"The database does not know {', '.join(unknown)}.")
sys.exit(1 if found else 0)
