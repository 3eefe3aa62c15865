"""The README's Python blocks run, in order, as one program; generated pages are not stale."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_python_block_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write files
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(blocks) >= 5
    names: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["logits"].shape == (4, 2, 3)


def test_the_commands_of_the_readme_exist():
    from jaxpeft.cli import COMMANDS

    shells = "\n".join(re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.S))
    used = set(re.findall(r"^(?:.*bin/)?jaxpeft (\w+)", shells, re.M))
    assert {"merge", "evaluate", "predict", "compare"} <= used <= set(COMMANDS)


def test_generated_pages_are_not_stale():
    out = subprocess.run(
        [sys.executable, ROOT / "experiments" / "report.py", "--check"], capture_output=True, text=True, check=False
    )
    assert out.returncode == 0, out.stdout + out.stderr


def test_the_recipe_of_the_readme_is_one(tmp_path):
    import yaml

    from jaxpeft.merge.recipe import read_recipe

    for name in ("base", "chat", "code"):
        (tmp_path / name).mkdir()
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    recipe = read_recipe(yaml.safe_load(block), tmp_path)
    assert recipe.number("density", "x", 0.5, recipe.models[0]) == 0.35
    assert recipe.number("weight", "layers.0.mlp.up", 0, recipe.models[1]) == 0.8
