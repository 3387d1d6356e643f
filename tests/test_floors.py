"""Imports run one way, as pyproject states; text needs no torch; the face is what the papers are
about."""

import subprocess
import sys
from pathlib import Path

import kdlib

ROOT = Path(kdlib.__file__).parent


def test_imports_run_one_way():
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT.parent)
    assert done.returncode == 0, done.stdout


def test_text_imports_no_torch():
    code = "import sys, kdlib.text.corpora, kdlib.text.demo; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_face_holds_models_losses_and_methods_alone():
    face = {"__init__", "__main__", "crf", "losses", "methods", "batches", "models", "twin_tower"}
    assert {f.stem for f in ROOT.glob("*.py")} == face
