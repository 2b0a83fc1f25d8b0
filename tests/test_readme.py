"""Every ```python block of README.md and docs/*.md runs: a file's blocks one after the other, in an empty folder."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^(?P<indent> *)```python(?P<mark>[^\n]*)\n(?P<code>.*?)^ *```$", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"no-run: \S.+")
PAGES = sorted(page for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")] if page.exists())


def blocks(page):
    """(line, code) of each block that runs; a block marked `no-run` must say why."""
    text, found = page.read_text(), []
    for fence in FENCE.finditer(text):
        line, mark = text.count("\n", 0, fence.start()) + 2, fence["mark"].strip()
        if mark and not MARK.fullmatch(mark):
            raise ValueError(
                f"Expected ```python or ```python no-run: <reason>, got {mark!r} in {page.name}:{line - 1}."
            )
        if not mark:
            code = re.sub(f"^{fence['indent']}", "", fence["code"], flags=re.MULTILINE)
            found.append((line, code))
    return found


def run(page):
    """Run the page's blocks in one fresh namespace; errors carry the page's own line numbers."""
    namespace = {"__name__": "__page__"}
    for line, code in blocks(page):
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)  # noqa: S102 - the page is under test
    return namespace


@pytest.mark.global_random("a page is a user's own script")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(page)


def write(folder, text):
    page = folder / "page.md"
    page.write_text(text)
    return page


def test_blocks_share_a_namespace_and_keep_their_lines(tmp_path):
    page = write(
        tmp_path, "text\n```python\na = 1\n```\n\n- item\n\n  ```python\n  b = a + 1\n  ```\n```bash\nno\n```\n"
    )
    assert [line for line, _ in blocks(page)] == [3, 9]
    assert run(page)["b"] == 2


def test_a_broken_block_fails_with_its_line(tmp_path):
    page = write(tmp_path, "```python\na = 1\n```\n```python\n\na / 0\n```\n")
    with pytest.raises(ZeroDivisionError) as raised:
        run(page)
    assert raised.traceback[-1].lineno == 5  # counted from 0


def test_a_block_is_skipped_only_for_a_reason(tmp_path):
    assert blocks(write(tmp_path, "```python no-run: needs a GPU\n1 / 0\n```\n")) == []
    for mark in ("no-run", "no-run:", "norun: because"):
        with pytest.raises(ValueError, match="no-run: <reason>"):
            blocks(write(tmp_path, f"```python {mark}\n1 / 0\n```\n"))
