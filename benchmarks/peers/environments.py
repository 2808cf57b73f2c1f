"""An environment for each peer, with the versions of its list."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
CACHE = Path.home() / ".cache" / "snugtune" / "benchmarks"


def interpreter(peer: str, envs: Path) -> Path:
    """The Python that runs `peer`; its environment is made, or made anew after its list changed. snugtune's is this one."""
    if peer == "snugtune":
        return Path(sys.executable)
    requirements = HERE / f"{peer}.txt"
    place, wanted = envs / peer, hashlib.sha256(requirements.read_bytes()).hexdigest()
    done, python = place / "installed", place / "bin" / "python"
    if not done.exists() or done.read_text() != wanted:
        print(f"installing {peer} into {place}", file=sys.stderr, flush=True)
        shutil.rmtree(place, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "-r", str(requirements)]
        if subprocess.run(install, check=False).returncode:
            raise SystemExit(f"{peer} could not be installed; where pip finds no CPU build of torch, see the README beside this")
        done.write_text(wanted)
    return python
