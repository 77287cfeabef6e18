"""What README.md and CONTRIBUTING.md show runs, and the plugin table is the present one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hf_ext.cli import readme
from hf_ext.testing.local_hub import LocalHub

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def run(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    found = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert found.returncode == 0, f"{found.stdout[-3000:]}\n{found.stderr[-3000:]}"
    return found


def test_plugin_table_is_that_of_the_installed_plugins() -> None:
    assert readme.renewed(README) == README, "run `make readme`"


def test_first_screen_shows_all_four_uses() -> None:
    first_screen = "\n".join(README.splitlines()[:50])
    for use in ("custom_generate=ContrastiveSearch(", "from_pretrained(", "callbacks=[MEAP(", "hub.push("):
        assert use in first_screen


def test_code_of_the_readme_runs_in_order_without_network(tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 8
    with LocalHub() as hub:
        checks = [
            "assert out.shape[1] > inputs['input_ids'].shape[1]",
            "assert type(swan) is SwanGPTForCausalLM",
            "assert swan.training",
            "hub.push('contrastive-search', 'user/contrastive-search', check=False)",
            "assert strategy.report.tokens > 0",
            "assert 0 < max(cache.held()) < cache.get_seq_length()",
            "assert [entry for entry in trainer.state.log_history if 'train_loss' in entry]",
            "assert sft.state.global_step == 2",
        ]
        program = "\n".join(part for pair in zip(blocks, checks, strict=True) for part in pair)
        run("-c", program, cwd=tmp_path, **hub.environment())
        assert "custom_generate/generate.py" in hub.files("user/contrastive-search")


def test_worked_example_of_contributing_is_a_working_plugin(tmp_path: Path) -> None:
    files = dict(re.findall(r"<!-- file: (\S+) -->\n```python\n(.*?)^```", CONTRIBUTING, re.DOTALL | re.MULTILINE))
    assert len(files) == 4
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    info = tmp_path / "typical-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: typical\nVersion: 1.0\n", encoding="utf-8")
    [group] = re.findall(r'`\[project\.entry-points\."([\w.]+)"\]`', CONTRIBUTING)
    [entry] = re.findall(r'`(\w+) = "([\w:]+)"`', CONTRIBUTING)
    (info / "entry_points.txt").write_text(f"[{group}]\n{entry[0]} = {entry[1]}\n", encoding="utf-8")
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    # One kind of model for each check here; the suite's own breadth is tested with this package's strategies.
    fewer = "not llama and not qwen3 and not mistral and not gemma3"
    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", tmp_path)
    tests = run(*command, "-k", fewer, "test_most_typical.py", cwd=tmp_path, PYTHONPATH=path)
    assert re.search(r"^\d{2,} passed", tests.stdout, re.MULTILINE), tests.stdout
    program = (
        "from hf_ext import cli, verify\n"
        "arguments = ['generate', '--strategy', 'most-typical', '--set', 'top_k=3', '--max-new-tokens', '4', 'x']\n"
        "assert cli.main(arguments) == 0\n"
        "results = verify.run(['most-typical'])\n"
        "assert [r.status for r in results] == ['reproduced'], results\n"
        "[card] = [p for p in verify.write(results, root='.') if p.suffix == '.md']\n"
        "assert 'reproduced' in card.read_text()\n"
        "import doctest, most_typical; assert doctest.testmod(most_typical) == (0, 1)\n"
    )
    shown = run("-c", program, cwd=tmp_path, PYTHONPATH=path)
    assert "MostTypical: 4 tokens" in shown.stderr


#: Pages whose code runs here (that of others runs in the tests of what they describe), and how many blocks each holds.
PAGES = {
    "speculative-decoding": 3,
    "cache": 2,
    "objectives": 3,
    "attention-methods": 1,
    "cache-quantisation": 2,
    "denoising": 3,
    "gfn-lm": 1,
    "gradients-and-steps": 2,
    "sequencematch": 1,
    "structured-prompts": 2,
    "token-losses": 4,
}
#: What else is to be seen where the code of a page has run to its end.
PRINTED = {
    "attention-methods": "{0: ",
    "cache-quantisation": "layer",
    "denoising": "train_loss",
    "gfn-lm": "def f0(x):",
    "gradients-and-steps": "train_loss",
    "sequencematch": "def area(r):",
    "structured-prompts": "# uses: ",
    "token-losses": "ua-clm {",
}

RUN_PAGES = """
import contextlib, runpy, sys
for name in sys.argv[1:]:
    with open(f"{name}.out", "w") as out, contextlib.redirect_stdout(out):
        runpy.run_path(f"{name}.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the code of each page prints, run as a script; one process for all, as most of its time goes to imports."""
    folder = tmp_path_factory.mktemp("pages")
    for name, count in PAGES.items():
        page = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
        blocks = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
        assert len(blocks) == count, f"docs/{name}.md holds {len(blocks)} blocks of code, expected {count}"
        (folder / f"{name}.py").write_text("\n\n".join(blocks), encoding="utf-8")
    run("-c", RUN_PAGES, *PAGES, cwd=folder, HF_HUB_OFFLINE="1")
    return {name: (folder / f"{name}.out").read_text() for name in PAGES}


def test_code_of_the_page_on_speculative_decoding_runs(printed: dict[str, str]) -> None:
    assert "SpeculativeDecoding: 64 tokens" in printed["speculative-decoding"]


def test_code_of_the_page_on_caches_runs(printed: dict[str, str]) -> None:
    assert "CompressedCache(SnapKV(budget=0.25" in printed["cache"]


def test_code_of_the_page_on_objectives_runs(printed: dict[str, str]) -> None:
    assert printed["objectives"].count("clean_loss") == 6  # three trainers print two steps each


@pytest.mark.parametrize("page", PRINTED)
def test_code_of_other_pages_runs(page: str, printed: dict[str, str]) -> None:
    assert PRINTED[page] in printed[page]


def test_links_between_the_pages_lead_somewhere() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("model_cards/*.md")]
    broken = []
    for page in [*pages, *ROOT.glob("benchmarks/results/*.md")]:
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        for link in re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", text):
            file, _, anchor = link.partition("#")
            target = page.parent / file if file else page
            if not target.exists() or (anchor and anchor not in anchors(target)):
                broken.append(f"{page.name}: {link}")
    assert broken == []


def anchors(page: Path) -> set[str]:
    """Return the names that its headings have in links."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
