"""Pages of the site that mkdocs does not find by itself: notebooks, the changelog, measured records.

Links that leave docs/ work in a checkout. On the site they lead to such a page, or, for a folder of records and for a
file of code, become the plain text of the path.
"""

import json
import re
from pathlib import Path
from posixpath import dirname, join, normpath, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
# Path in the checkout -> path on the site.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    **{
        path.relative_to(ROOT).as_posix(): path.relative_to(ROOT).as_posix()
        for pattern in ("profiles/*/README.md", "profiles/*/sweep/*.svg")
        for path in sorted(ROOT.glob(pattern))
    },
    "LICENSE": "LICENSE",
}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside docs/ that are pages or pictures of the site."""
    for source, target in PAGES.items():
        if target != "index.md":
            level = InclusionLevel.NOT_IN_NAV if target.startswith("profiles/") else InclusionLevel.INCLUDED
            files.append(File.generated(config, target, abs_src_path=str(ROOT / source), inclusion=level))
    for path in sorted((ROOT / "docs").glob("*.ipynb")):
        files.append(File.generated(config, f"{path.stem}.md", content=notebook_page(path)))
    return files


def notebook_page(path: Path) -> str:
    """Return the cells of a notebook as Markdown, without outputs."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    texts = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    parts = [f"```python\n{text}\n```" if kind == "code" else text for kind, text in texts]
    return "\n\n".join([*parts, f"This page is the notebook [{path.name}]({path.name})."]) + "\n"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links that leave docs/ into links of the site, or into text."""
    here = page.file.src_uri
    origin = {target: source for source, target in PAGES.items() if target != "index.md"}.get(here, f"docs/{here}")

    def moved(link: re.Match[str]) -> str:
        mark, text, address = link.groups()
        target, _, anchor = address.partition("#")
        if not target or re.match(r"[a-z]+:", target):
            return link[0]
        path = normpath(join(dirname(origin), target))
        if not (ROOT / path).exists():
            return link[0]  # mkdocs reports it
        on_site = path.removeprefix("docs/") if path.startswith("docs/") else PAGES.get(path)
        if path.endswith(".ipynb") and here != f"{Path(path).stem}.md":
            on_site = f"{Path(path).stem}.md"
        on_site = on_site or PAGES.get(f"{path}/README.md")
        if on_site is None or files.get_file_from_path(on_site) is None:
            return text if "`" in text else f"`{text}`"
        return f"{mark}[{text}]({relpath(on_site, dirname(here) or '.')}{'#' if anchor else ''}{anchor})"

    parts = re.split(r"(^```.*?^```)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else LINK.sub(moved, part) for part in parts)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Refuse a page that loads a script, a style or a picture from another site: the pages are read offline."""
    tags = r"""<(?:script|img|link)\b[^>]*?\b(?:src|href)=["']?(?:https?:)?//[^"'\s>]+"""
    loaded = [tag for tag in re.findall(tags, output) if "canonical" not in tag]
    if loaded:
        raise PluginError(f"{page.file.src_uri}: loads from another site: {loaded[0]}")
    return output
